"""`train` refuses what cannot work before anything starts: exit code 2, one message with the fix, no traceback."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.__main__ import app

GOOD_REWARD = "def f(completions, **kwargs):\n    return [0.0] * len(completions)\n"
ROWS = '{"prompt": "say a", "answer": "a"}\n{"prompt": "say b", "answer": "b"}\n'

RECIPE = """
kind: grpo
name: case
steps: 1
groups_per_batch: 2
model: {{kind: pretrained, path: {model}}}
dataset: {{path: {folder}/rows.jsonl}}
rewards: {{functions: [{{function: "{folder}/reward.py:f"}}]}}
algorithm: {{num_generations: 2}}
generation: {{max_prompt_length: 32, max_completion_length: 8}}
pools:
  policy: {{cpus_per_worker: 0.25}}
  rollout: {{cpus_per_worker: 0.25}}
  reward: {{cpus_per_worker: 0.25}}
  reference: {{cpus_per_worker: 0.25}}
run_dir: {folder}/run
"""

# What is changed (overrides, or a file's new text) -> what the message must say.
CASES: dict[str, tuple[list[str], dict[str, str], list[str]]] = {
    "misspelt key": (["staleness.max_stalenes=2"], {}, ["unknown key", "did you mean 'max_staleness'"]),
    "misspelt section": (["genration.top_p=0.9"], {}, ["genration", "generation"]),
    "wrong type": (["steps=many"], {}, ["steps", "integer"]),
    "one generation": (["algorithm.num_generations=1"], {}, ["num_generations", "2 or more"]),
    "no generation": (["algorithm.num_generations=0"], {}, ["num_generations", "at least 1"]),
    "stale without correction": (
        ["staleness.max_staleness=2", "algorithm.vllm_importance_sampling_correction=false"],
        {},
        ["off-policy correction", "vllm_importance_sampling_correction"],
    ),
    "corrected twice": (["algorithm.old_logprobs=sampled"], {}, ["applied twice"]),
    "shallow pipeline": (["staleness.pipeline_depth=1"], {}, ["pipeline_depth", "never fill a batch"]),
    "unknown way with stale groups": (["staleness.when_stale=drop"], {}, ["when_stale", "requeue"]),
    "nothing to mask": (
        ["staleness.when_stale=mask", "staleness.max_staleness=0"],
        {},
        ["when_stale", "'pace'"],
    ),
    "mask whole groups": (
        ["staleness.when_stale=mask", "staleness.in_flight_updates=false"],
        {},
        ["in_flight_updates", "whole groups"],
    ),
    "sample less than is trained": (["staleness.over_sampling=0.5"], {}, ["over_sampling", "1"]),
    "no band": (["staleness.adapt_depth={{ess_low: 0.9, ess_high: 0.5}}"], {}, ["ess_low", "ess_high"]),
    "KL without a reference": (["staleness.adapt_depth={{kl_max: 0.1}}"], {}, ["kl_max", "algorithm.beta"]),
    "unknown filter": (["algorithm.dynamic_sampling={{kind: best}}"], {}, ["dynamic_sampling", "zero_std"]),
    "empty reward band": (
        ["algorithm.dynamic_sampling={{kind: reward_band, min: 0.9, max: 0.1}}"],
        {},
        ["dynamic_sampling", "no group would pass"],
    ),
    "no room on the replica": (["rollout.max_groups_per_replica=0"], {}, ["max_groups_per_replica", "1"]),
    "no such layer to adapt": (
        ["policy.lora.target_modules=[q_proj, query]"],
        {},
        ["policy.lora.target_modules", "'query'", "choose from down_proj"],
    ),
    "dropout that replicas lack": (["policy.lora.lora_dropout=0.1"], {}, ["policy.lora.lora_dropout", "set it to 0"]),
    "unknown transport": (["sync.transport=carrier-pigeon"], {}, ["sync.transport", "gloo"]),
    "unknown loss": (["algorithm.loss_type=ppo2"], {}, ["loss_type", "dapo"]),
    "more ranks than rollouts": (["pools.policy.num_workers=9"], {}, ["9 policy ranks"]),
    "too many GPUs": (["pools.rollout.gpus_per_worker=4096"], {}, ["rollout", "GPU"]),
    "too many CPUs": (["pools.policy.cpus_per_worker=4096"], {}, ["policy", "CPU"]),
    "resource that no node has": (["pools.reward.node_resource=unobtainium"], {}, ["reward", "unobtainium"]),
    "rule that measures nothing": (["health.rules=[{{kind: kl}}]"], {}, ["health.rules", "algorithm.beta"]),
    "unknown rule": (["health.rules=[{{kind: boredom}}]"], {}, ["health.rules", "boredom", "zero_std"]),
    "rule with a stranger's threshold": (["health.rules=[{{kind: entropy, max: 1}}]"], {}, ["health.rules", "max"]),
    "nothing to roll back to": (
        ["health.rules=[{{kind: entropy, action: roll_back}}]", "checkpoint.every=0"],
        {},
        ["health.rules", "checkpoint.every"],
    ),
    "unknown action": (["health.rules=[{{kind: entropy, action: cry}}]"], {}, ["action", "cry", "roll_back"]),
    "more failures than calls": (["rewards.max_failed_share=1.5"], {}, ["rewards.max_failed_share", "1"]),
    "no group at a time": (["rewards.max_concurrent_groups=0"], {}, ["rewards.max_concurrent_groups", "at least 1"]),
    "all rows may be bad": (["dataset.max_bad_rows=9"], {}, ["dataset.max_bad_rows", "rows.jsonl", "lower it"]),
    "one bad row too many": (
        ["dataset.max_bad_rows=1"],
        {"rows.jsonl": '{"prompt": "a"}\n{"prompt": ""}\n{"prompt": " "}\n'},
        ["row 2: the prompt is empty", "dataset.max_bad_rows allows 1"],
    ),
    "no such file": (["dataset.path={folder}/none.jsonl"], {}, ["none.jsonl"]),
    "unknown suffix": (["dataset.path={folder}/rows.txt"], {"rows.txt": ROWS}, ["rows.txt", "jsonl"]),
    "empty file": ([], {"rows.jsonl": ""}, ["rows.jsonl"]),
    "broken JSON": ([], {"rows.jsonl": '{"prompt": "a"\n'}, ["rows.jsonl"]),
    "no prompt column": ([], {"rows.jsonl": '{"question": "a"}\n'}, ["no column 'prompt'", "question"]),
    "prompt is a number": ([], {"rows.jsonl": '{"prompt": 3}\n'}, ["row 0", "prompt"]),
    "empty conversation": ([], {"rows.jsonl": '{"prompt": []}\n'}, ["row 0", "empty conversation"]),
    "reserved column": ([], {"rows.jsonl": '{"prompt": "a", "completions": 1}\n'}, ["completions", "rename"]),
    "prompt too long": ([], {"rows.jsonl": '{"prompt": "%s"}\n' % ("x" * 99)}, ["row 0", "99", "max_prompt_length"]),
    "longer than the model": (["generation.max_prompt_length=250"], {}, ["256 positions", "lower"]),
    "task settings for a file": (["dataset.task.min_word_len=3"], {}, ["dataset.task"]),
    "unknown task": (["dataset.path=reasoning_gym:spel_backward", "dataset.size=9"], {}, ["spell_backward"]),
    "endless task": (["dataset.path=reasoning_gym:spell_backward"], {}, ["dataset.size"]),
    "unknown task setting": (
        ["dataset.path=reasoning_gym:spell_backward", "dataset.size=9", "dataset.task.min_len=3"],
        {},
        ["min_len", "min_word_len"],
    ),
    "size beyond the file": (["dataset.size=3"], {}, ["dataset.size", "2"]),
    "unknown split": (["dataset.split=validation"], {}, ["validation"]),
    "no model": (["model.path={folder}/none"], {}, ["model.path", "none"]),
    "folder without model": (["model.path={folder}"], {}, ["model.path", "config.json"]),
    "unknown kind of model": (["model.kind=magic"], {}, ["model.kind", "pretrained"]),
    "recipe of itself": (["model={{kind: recipe, recipe: {folder}/recipe.yaml}}"], {}, ["before itself"]),
    "missing recipe before": (["model={{kind: recipe, recipe: {folder}/first.yaml}}"], {}, ["first.yaml"]),
    "no reward file": (["rewards.functions.0.function={folder}/none.py:f"], {}, ["none.py"]),
    "no reward function": (["rewards.functions.0.function={folder}/reward.py:g"], {}, ["g", "f"]),
    "reward without name": (["rewards.functions.0.function={folder}/reward.py"], {}, ["reward.py", ":"]),
    "no reward module": (["rewards.functions.0.function=no_such_module:f"], {}, ["no_such_module"]),
    "reward that does not import": ([], {"reward.py": "import no_such_thing\n"}, ["no_such_thing", "reward.py"]),
    "reward with a syntax error": ([], {"reward.py": "def f(:\n"}, ["reward.py", "line 1"]),
    "reward that is no function": ([], {"reward.py": "f = 3\n"}, ["f", "cannot be called"]),
    "reward without completions": ([], {"reward.py": "def f(x):\n    return x\n"}, ["completions"]),
    "no reward at all": (["rewards.functions=[]"], {}, ["rewards.functions"]),
    "override without value": (["steps"], {}, ["steps", "="]),
    "run folder in use": (
        [],
        {"run/recipe.yaml": "kind: grpo\n", "run/summary.json": "{}"},
        ["already holds a run", "--overwrite"],
    ),
    "run folder of something else": ([], {"run/thesis.txt": "mine"}, ["not a run folder"]),
    "supervised data without completion": (
        ["kind=sft", "batch_size=2"],
        {"recipe.yaml": "kind: sft\nname: case\nsteps: 1\nbatch_size: 2\nmax_length: 64\n"
         "model: {{kind: pretrained, path: {model}}}\ndataset: {{path: {folder}/rows.jsonl}}\n"},
        ["no column 'completion'"],
    ),
    "supervised runs have no reward": (
        ["checkpoint.best={{}}"],
        {"recipe.yaml": "kind: sft\nname: case\nsteps: 1\nbatch_size: 2\nmax_length: 64\n"
         "model: {{kind: pretrained, path: {model}}}\ndataset: {{path: {folder}/rows.jsonl}}\n"},
        ["checkpoint.best.metric", "metric: loss"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_bad_recipe_is_refused(case: str, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    overrides, files, expected = CASES[case]
    names = {"folder": tmp_path, "model": tiny_models["untied"]}
    texts = {"recipe.yaml": RECIPE, "rows.jsonl": ROWS, "reward.py": GOOD_REWARD} | files
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.format(**names) if name.endswith("recipe.yaml") else text)
    arguments = [override.format(**names) for override in overrides]
    result = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml"), *arguments])
    assert result.exit_code == 2, result.output
    assert sum(line.startswith("error: ") for line in result.output.splitlines()) == 1, result.output
    assert "Traceback" not in result.output
    for text in expected:
        assert text in result.output, result.output
    left = {path.name for path in (tmp_path / "run").glob("*")} if (tmp_path / "run").exists() else set()
    assert left == {name.removeprefix("run/") for name in files if name.startswith("run/")}, "nothing is lost or left"


@pytest.mark.parametrize(
    ("address", "said"),
    [("127.0.0.1:9", "nobody answers there; start Ray there"), ("http://127.0.0.1:9", "python -m deploy submit")],
)
def test_a_cluster_that_is_not_there_is_refused(
    address: str, said: str, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    for name, text in {"recipe.yaml": RECIPE, "rows.jsonl": ROWS, "reward.py": GOOD_REWARD}.items():
        (tmp_path / name).write_text(
            text.format(folder=tmp_path, model=tiny_models["untied"]) if "yaml" in name else text
        )
    result = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml"), "--address", address])
    assert result.exit_code == 2, result.output
    assert f"error: --address {address}: " in result.output
    assert said in result.output
    assert not (tmp_path / "run").exists()
