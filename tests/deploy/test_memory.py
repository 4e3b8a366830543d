"""`plan` refuses what cannot fit on the GPUs, takes what can, and the fix that it names is one."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.recipe.file import load_recipe
from actors.recipe.pools import used_pools
from actors.recipe.schema import GrpoRecipe
from deploy.memory import Estimate, estimate, policy_load, version_bytes
from deploy.shapes import model_shape
from placement.cluster import ClusterSpec, NodeSpec, uniform
from placement.memory.fit import MemoryShortageError
from placement.plan import plan

ROOT = Path(__file__).parents[2]

KEYS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
MODELS = {
    "1.5B": ("qwen2", (28, 1536, 8960, 12, 2), 151936, True),
    "7B": ("qwen2", (28, 3584, 18944, 28, 4), 152064, False),
    "32B": ("qwen2", (64, 5120, 27648, 40, 8), 152064, False),
    "70B": ("llama", (80, 8192, 28672, 64, 8), 128256, False),
}

RECIPE = """
kind: grpo
name: sized
steps: 10
groups_per_batch: 64
dataset: {path: data.jsonl}
rewards: {functions: [{function: "rewards.py:exact"}]}
policy: {dtype: bfloat16, zero_stage: 3, gradient_checkpointing: true}
rollout: {dtype: bfloat16}
generation: {max_prompt_length: 1024, max_completion_length: 3072}
pools:
  policy: {num_workers: 8, gpus_per_worker: 1}
  rollout: {num_workers: 4, gpus_per_worker: 1}
  reference: {num_workers: 1, gpus_per_worker: 1}
"""

Run = Callable[..., Estimate]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The estimate of a model and overrides on GPUs of so many GB."""
    for name, (kind, sizes, vocabulary, tied) in MODELS.items():
        config = dict(zip(KEYS, sizes, strict=True)) | {"vocab_size": vocabulary, "tie_word_embeddings": tied}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    (tmp_path / "sized.yaml").write_text(RECIPE)

    def estimated(model: str, gpu_gb: float | None, *overrides: str, cluster: ClusterSpec | None = None) -> Estimate:
        chosen = f"model={{kind: pretrained, path: {tmp_path / model}}}"
        recipe = load_recipe(tmp_path / "sized.yaml", (chosen, *overrides))
        cluster = cluster or uniform(256, 64.0, 8)
        return estimate(recipe, plan(used_pools(recipe), cluster), cluster, gpu_gb)

    return estimated


def ranks(number: int) -> str:
    return f"pools.policy.num_workers={number}"


def parallel(number: int) -> str:
    return f"pools.rollout.gpus_per_worker={number}"


LORA = "policy.lora={r: 32, lora_alpha: 64}"
STAGE_0 = "policy.zero_stage=0", "policy.dtype=float32"
WHOLE = "policy.gradient_checkpointing=false"
PPO = (
    "algorithm={advantage: gae, baseline: none, scale_rewards: none}",
    "pools.critic={num_workers: 8, gpus_per_worker: 1}",
)
FITS = [
    ("7B", 80, (*PPO, "critic={dtype: bfloat16, zero_stage: 3}")),
    ("1.5B", 80, ()),
    ("1.5B", 80, (ranks(1),)),
    ("1.5B", 80, (ranks(4), "policy.zero_stage=2")),
    ("1.5B", 80, (WHOLE, ranks(4))),
    ("1.5B", 40, (ranks(4), "policy.zero_stage=1")),
    ("1.5B", 24, (ranks(4), "policy.max_tokens_per_micro_batch=4096")),
    ("7B", 80, ()),
    ("7B", 80, (ranks(4),)),
    ("7B", 80, (ranks(8), "policy.zero_stage=2")),
    ("7B", 80, ("algorithm.beta=0.01",)),
    ("7B", 40, ()),
    ("7B", 24, (LORA, "policy.max_tokens_per_micro_batch=4096")),
    ("7B", 80, (LORA, ranks(1), "policy.zero_stage=0", "policy.dtype=float32")),
    ("7B", 141, ("sync.staging=device", "rollout.gpu_memory_utilization=0.8")),
    ("32B", 80, (ranks(16), parallel(2))),
    ("32B", 141, (ranks(8), parallel(1))),
    ("32B", 80, (LORA, parallel(2))),
    ("70B", 80, (ranks(64), parallel(4))),
    ("70B", 80, (LORA, parallel(4))),
    ("70B", 141, (LORA, parallel(2))),
]
# The overrides, then what the message must say: pool, what weighs most, and a fix.
FAILS = [
    ("1.5B", 24, (WHOLE,), "policy", "policy.gradient_checkpointing=true"),
    ("1.5B", 16, (ranks(1), "policy.zero_stage=1"), "policy", ranks(4)),
    ("7B", 28, (LORA, ranks(1), *STAGE_0), "policy", "policy.dtype=bfloat16 policy.zero_stage=1"),
    ("7B", 80, (ranks(1),), "policy", ranks(2)),
    ("7B", 80, (*STAGE_0,), "policy", "policy.zero_stage=1"),
    ("7B", 64, ("policy.zero_stage=1",), "policy", "policy.zero_stage=2"),
    ("7B", 80, (WHOLE, "policy.max_tokens_per_micro_batch=16384"), "policy", "policy.gradient_checkpointing=true"),
    ("7B", 80, ("policy.max_tokens_per_micro_batch=262144",), "policy", "policy.max_tokens_per_micro_batch=131072"),
    ("7B", 40, (ranks(4),), "policy", ranks(8)),
    ("7B", 24, (), "policy", ranks(16)),
    ("7B", 32, (LORA, "policy.max_tokens_per_micro_batch=65536"), "policy", "policy.max_tokens_per_micro_batch=32768"),
    ("7B", 80, ("policy.dtype=float32", ranks(2)), "policy", ranks(4)),
    ("7B", 48, ("policy.dtype=float32", ranks(4)), "policy", "policy.dtype=bfloat16"),
    ("7B", 80, ("generation.max_completion_length=150000",), "policy", "policy.sequence_parallel_size=2, or pools"),
    ("7B", 80, ("generation.max_completion_length=300000",), "policy", "policy.sequence_parallel_size=4"),
    ("7B", 80, ("sync.staging=device",), "rollout", "sync.staging=host, or rollout.gpu_memory_utilization=0.8"),
    ("7B", 80, ("rollout.gpu_memory_utilization=0.15",), "rollout", "rollout.gpu_memory_utilization=0.8"),
    ("7B", 24, (ranks(64), "rollout.dtype=float32"), "rollout", parallel(2)),
    ("32B", 80, (parallel(2),), "policy", ranks(16)),
    ("32B", 80, (ranks(16), "rollout.gpu_memory_utilization=0.75"), "rollout", parallel(2)),
    ("32B", 80, (ranks(8), parallel(2), "algorithm.beta=0.1", "policy.dtype=float32"), "policy", ranks(16)),
    ("32B", 80, (ranks(64), parallel(2), "algorithm.beta=0.1", "policy.dtype=float32"), "reference", "dtype=bfloat16"),
    ("7B", 80, (*PPO, "critic={dtype: float32, zero_stage: 0}"), "critic", "critic.zero_stage=1"),
    ("7B", 80, (*PPO, "critic={zero_stage: 3}", "pools.critic.num_workers=1"), "critic", "pools.critic.num_workers=4"),
    ("70B", 80, (parallel(4),), "policy", ranks(32)),
    ("70B", 80, (LORA, parallel(2)), "rollout", parallel(4)),
    ("70B", 80, (ranks(64), parallel(4), "algorithm.beta=0.1"), "reference", "algorithm.beta=0"),
    ("70B", 80, (LORA, parallel(4), "policy.zero_stage=2"), "policy", "policy.zero_stage=3"),
    ("70B", 24, (LORA, parallel(8)), "policy", ranks(16)),
]


def named(case: tuple[object, ...]) -> str:
    return " ".join(str(part) for part in case[:2]) + " " + " ".join(map(str, case[2]))  # type: ignore[call-overload]


@pytest.mark.parametrize("case", FITS, ids=named)
def test_what_fits_is_taken(run: Run, case: tuple[str, float, tuple[str, ...]]) -> None:
    model, gpu_gb, overrides = case
    found = run(model, gpu_gb, *overrides)
    assert found.table is not None
    assert found.table.columns[1].header == "policy"


@pytest.mark.parametrize("case", FAILS, ids=named)
def test_what_cannot_fit_is_refused_with_a_fix_that_fits(
    run: Run, case: tuple[str, float, tuple[str, ...], str, str]
) -> None:
    model, gpu_gb, overrides, pool, fix = case
    with pytest.raises(MemoryShortageError) as refused:
        run(model, gpu_gb, *overrides)
    message = str(refused.value)
    assert message.startswith(f"pool '{pool}' needs ")
    assert fix in message
    missing = re.search(r"([\d.]+) GB are missing", message)
    assert missing is not None
    assert float(missing[1]) > 0
    for alternative in message.split("; set ")[1].split(", or "):
        changes = [word for word in alternative.split() if "=" in word]
        changes = [change.rstrip(",") for change in changes]
        try:
            run(model, gpu_gb, *overrides, *changes)
        except MemoryShortageError as error:  # another pool may lack memory too, but not this one
            assert not str(error).startswith(f"pool '{pool}'"), alternative  # noqa: PT017


SHARED = "pools.rollout={num_workers: 8, gpus_per_worker: 1, colocate_with: policy}"


def test_what_shares_a_gpu_is_summed_and_refused_with_a_fix_that_fits(run: Run) -> None:
    assert run("1.5B", 80, SHARED).shared is not None
    with pytest.raises(MemoryShortageError) as refused:
        run("7B", 80, SHARED)
    message = str(refused.value)
    assert re.match(
        r"the GPUs that 'policy' and 'rollout' share need [\d.]+ GB while replicas sample, and have 80: [\d.]+ GB are "
        r"missing \('policy' [\d.]+, 'rollout' 68.0\); set rollout.gpu_memory_utilization=0.\d\d, or policy.offload=",
        message,
    )
    for fix in message.split("; set ")[1].split(", or "):
        found = run("7B", 80, SHARED, fix.replace("'", ""))
        assert found.shared is not None
        assert [column.header for column in found.shared.columns[1:]] == [
            "while the policy computes",
            "while replicas sample",
        ]


def test_a_reference_that_shares_a_gpu_counts_at_its_worst(run: Run) -> None:
    reference = ("algorithm.beta=0.01", "pools.reference={gpus_per_worker: 1, colocate_with: policy}")
    alone = run("7B", 80, "algorithm.beta=0.01")
    assert alone.shared is None
    found = run("7B", 80, *reference).shared
    assert found is not None
    assert len(found.columns) == 2, "no replica shares it, so there is one moment"
    with pytest.raises(MemoryShortageError, match=r"'policy' and 'reference' share .* while the policy computes"):
        run("7B", 40, *reference)


def test_the_cases_are_as_many_as_they_should_be() -> None:
    assert len(FITS) + len(FAILS) >= 30


def test_what_no_knob_makes_fit_says_so(run: Run) -> None:
    with pytest.raises(MemoryShortageError, match=r"set policy.lora to train adapters, shorten generation"):
        run("70B", 16, "generation.max_completion_length=30000", parallel(8))


def test_a_team_that_cannot_share_out_the_heads_is_refused(run: Run) -> None:
    assert run("7B", 80, "policy.sequence_parallel_size=4").table is not None
    with pytest.raises(ValueError, match=r"^policy.sequence_parallel_size: 8 ranks cannot share out .* 28 attention"):
        run("7B", 80, "policy.sequence_parallel_size=8")
    with pytest.raises(ValueError, match=r"^critic.sequence_parallel_size: 8 ranks cannot share out .* 28 attention"):
        run("7B", 80, *PPO, "critic={dtype: bfloat16, zero_stage: 3, sequence_parallel_size: 8}")


def test_a_live_cluster_tells_its_gpus(run: Run) -> None:
    def cluster(*accelerators: str) -> ClusterSpec:
        return ClusterSpec(
            tuple(NodeSpec(f"n{i}", 64.0, 8, {f"accelerator_type:{a}": 1.0}) for i, a in enumerate(accelerators))
        )

    assert run("7B", None, cluster=cluster("H100", "H100")).table is not None
    with pytest.raises(MemoryShortageError, match=r"pool 'policy' needs .* which has 22.5"):
        run("7B", None, cluster=cluster("L4", "L4"))
    for unclear in (("A100", "A100"), ("H100", "X9")):
        assert "say --gpu-memory-gb" in run("7B", None, cluster=cluster(*unclear)).lines[0]
    assert "say --gpu-memory-gb" in run("32B", None).lines[0]  # too large for H100s, which nobody has told of


def test_of_adapters_only_what_is_adapted_travels(run: Run, tmp_path: Path) -> None:
    def travels(target_modules: str) -> float:
        lora = f"policy.lora={{r: 32, lora_alpha: 64, target_modules: {target_modules}}}"
        recipe = load_recipe(tmp_path / "sized.yaml", (f"model={{kind: pretrained, path: {tmp_path / '7B'}}}", lora))
        assert isinstance(recipe, GrpoRecipe)
        shape = model_shape(recipe)
        assert shape is not None
        assert policy_load(recipe, shape).num_trained == version_bytes(recipe, shape) / 2
        return version_bytes(recipe, shape)

    # Of each of 28 layers, a factor with 3584 inputs and one with as many, or with 512, outputs; 2 bytes an element.
    assert travels("[q_proj, v_proj]") == 2 * 28 * 32 * ((3584 + 3584) + (3584 + 512))
    assert travels("all-linear") > 5 * travels("[q_proj, v_proj]")


def test_a_teacher_is_measured_by_its_own_shape(run: Run, tmp_path: Path) -> None:
    teacher = ("algorithm.beta=0.1", f"reference={{kind: pretrained, path: {tmp_path / '32B'}}}")
    with pytest.raises(MemoryShortageError, match=r"pool 'reference' needs \d+\.\d GB on each GPU, which has 48"):
        run("7B", 48, *teacher)
    assert run("7B", 48, "algorithm.beta=0.1").table is not None
    unknown = run("7B", 48, "algorithm.beta=0.1", "reference={kind: pretrained, path: nobody/has-it}")
    assert unknown.lines[1].startswith("memory: the reference is not estimated: nobody/has-it is not on this machine")


def test_a_small_cache_is_told_and_not_refused(run: Run) -> None:
    lines = run("7B", 24, "rollout.max_num_seqs=512", "policy.max_tokens_per_micro_batch=1024", ranks(64)).lines
    assert re.search(r"KV cache of a replica: \d+ sequences of the longest kind, .* is 512; beyond them", lines[1])


def test_pools_without_gpus_take_none(run: Run) -> None:
    overrides = [f"pools.{pool}.gpus_per_worker=0" for pool in ("policy", "rollout", "reference")]
    assert run("70B", 24, *overrides) == Estimate([])


def test_a_model_that_is_not_here_is_said_and_skipped(tmp_path: Path) -> None:
    (tmp_path / "sized.yaml").write_text(RECIPE)
    for path in ("nobody/has-this-model", "not a name at all"):
        recipe = load_recipe(tmp_path / "sized.yaml", (f"model={{kind: pretrained, path: {path}}}",))
        cluster = uniform(2, 64.0, 8)
        found = estimate(recipe, plan(used_pools(recipe), cluster), cluster, 16)
        assert found.lines == [
            f"memory: not estimated: {path} is not on this machine; a folder with its config.json will do: "
            "model.path=FOLDER"
        ]


@pytest.mark.parametrize(
    ("text", "why"),
    [("{", "cannot be read"), ("[]", "holds no mapping"), ("{}", "does not say num_attention_heads")],
)
def test_a_config_that_cannot_be_understood_is_said_and_skipped(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "sized.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "sized.yaml", (f"model={{kind: pretrained, path: {tmp_path}}}",))
    cluster = uniform(2, 64.0, 8)
    (line,) = estimate(recipe, plan(used_pools(recipe), cluster), cluster, 16).lines
    assert line.startswith("memory: not estimated: ")
    assert why in line


def test_the_verb_refuses_with_exit_code_2(run: Run, tmp_path: Path) -> None:
    def deploy(*arguments: str) -> tuple[int, str, str]:
        model = f"model={{kind: pretrained, path: {tmp_path / '7B'}}}"
        command = [sys.executable, "-m", "deploy", "plan", str(tmp_path / "sized.yaml"), model, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
        assert "Traceback" not in done.stdout + done.stderr
        return done.returncode, done.stdout, done.stderr

    cluster = ("--nodes", "2", "--gpus-per-node", "8")
    code, out, err = deploy(*cluster, "--gpu-memory-gb", "80")
    assert (code, err) == (0, "")
    assert re.search(r"together +│ +[\d.]+ │ +68.0 │", out)
    code, out, err = deploy(*cluster, "--gpu-memory-gb", "24")
    assert (code, out) == (2, "")
    assert err.startswith("error: pool 'policy' needs ")
