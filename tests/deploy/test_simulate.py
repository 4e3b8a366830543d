"""`simulate` answers in virtual time: a rate, its limit, a better setting; or one message and exit code 2."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from actors.recipe.file import load_recipe
from actors.recipe.schema import GrpoRecipe
from deploy.__main__ import app
from deploy.simulate.options import compare
from deploy.simulate.setup import setup_of

RECIPE = """
kind: grpo
name: case
steps: 12
groups_per_batch: 16
model: {kind: tiny}
dataset: {path: rows.jsonl}
rewards: {functions: [{function: "reward.py:f"}]}
algorithm: {num_generations: 4}
generation: {max_prompt_length: 32, max_completion_length: 256}
staleness: {max_staleness: 2}
rollout: {max_num_seqs: 16}
pools:
  policy: {num_workers: 6}
  rollout: {num_workers: 2}
simulation:
  train: {per_step_s: 0.1, per_token_s: 1.0e-5}
  sync: {pause_s: 0.05, total_s: 0.1}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["simulate", *arguments])
    assert "Traceback" not in result.output
    return result.exit_code, result.output


def test_a_simulation_names_rate_limit_waits_and_the_best_split(recipe: Path) -> None:
    code, output = run(str(recipe))
    assert code == 0, output
    for text in ("12 steps in virtual time", "by the rollouts", "share of the bound", "idle (groups)", "versions"):
        assert text in output
    # The policy is far too large: nearly all workers belong to the rollouts.
    assert "with pools.policy.num_workers=1 pools.rollout.num_workers=7" in output


def test_what_is_advised_can_be_typed_and_is_as_fast_as_it_says(recipe: Path) -> None:
    before = load_recipe(recipe)
    assert isinstance(before, GrpoRecipe)
    comparison = compare(before, (), lambda done, total: None)
    advised = load_recipe(recipe, comparison.best.arguments.split())
    assert advised == comparison.best.recipe
    assert comparison.best.result.groups_per_s > 1.5 * comparison.as_it_is.result.groups_per_s
    assert advised.pools.policy.num_workers + advised.pools.rollout.num_workers == 8


def test_options_stay_within_what_the_recipe_allows(recipe: Path) -> None:
    loaded = load_recipe(
        recipe, ["algorithm.vllm_importance_sampling_correction=false", "staleness.max_staleness=0", "steps=4"]
    )
    assert isinstance(loaded, GrpoRecipe)
    comparison = compare(loaded, (), lambda done, total: None)
    assert {option.recipe.staleness.max_staleness for option in comparison.pacings} <= {0}


def test_progress_reaches_its_end(recipe: Path) -> None:
    seen: list[tuple[int, int]] = []
    loaded = load_recipe(recipe, ["steps=3"])
    assert isinstance(loaded, GrpoRecipe)
    compare(loaded, (), lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)


def test_gpus_are_counted_and_not_workers(recipe: Path) -> None:
    loaded = load_recipe(recipe, ["pools.policy.gpus_per_worker=1", "pools.rollout.gpus_per_worker=2", "steps=2"])
    assert isinstance(loaded, GrpoRecipe)
    splits = compare(loaded, (), lambda done, total: None).splits
    workers = [(o.recipe.pools.policy.num_workers, o.recipe.pools.rollout.num_workers) for o in splits]
    assert workers == [(2, 4), (4, 3), (6, 2), (8, 1)]


def test_a_picture_is_drawn(recipe: Path, tmp_path: Path) -> None:
    code, output = run(str(recipe), "steps=3", "--plot", str(tmp_path / "p.png"))
    assert (code, (tmp_path / "p.png").stat().st_size > 10_000) == (0, True)
    assert f"picture: {tmp_path}/p.png" in output


def test_lengths_come_from_a_run(recipe: Path, tmp_path: Path) -> None:
    lines = [{"event": "scored", "ordinal": n, "attempt": 0, "lengths": [40, 41, 42, 43]} for n in range(5)]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in (".", "ledger.jsonl"):
        code, output = run(str(recipe), "steps=3", f"simulation.lengths={{kind: trace, path: {path}}}")
        assert (code, "completions: 41.5 tokens sampled, 41.5 trained" in output) == (0, True), output


def test_placeholders_are_called_so(recipe: Path) -> None:
    assert "the times are placeholders" in run(str(recipe), "steps=2", "simulation={}")[1]
    assert "the times are placeholders" not in run(str(recipe), "steps=2")[1]


def test_the_setup_is_the_recipes(recipe: Path) -> None:
    loaded = load_recipe(recipe, ["staleness.over_sampling=1.5"])
    assert isinstance(loaded, GrpoRecipe)
    setup = setup_of(loaded)
    assert (setup.max_groups_per_replica, setup.pipeline_depth, setup.num_slots) == (16, 72, 32)
    assert not setup_of(loaded.model_copy(update={"staleness": loaded.staleness.model_copy(
        update={"max_staleness": 0})})).in_flight_updates  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulation.decode.bas_s=1"], "simulation.decode.bas_s: unknown key; did you mean 'base_s'?"),
        (["simulation.lengths={kind: normal}"], "simulation.lengths.kind: 'normal' is not one of 'lognormal'"),
        (["simulation.lengths={kind: geometric}"], "simulation.lengths.mean: required, but missing"),
        (["simulation.decode={base_s: 0, per_sequence_s: 0}"], "simulation.decode.base_s: with per_sequence_s 0 too"),
        (["simulation.sync.pause_s=3"], "simulation.sync.pause_s: 3 is part of total_s, which is only 0.1"),
        (["simulation.filtered_share=1"], "simulation.filtered_share: 1 is out of range"),
        (["simulation.lengths={kind: trace, path: none}"], "simulation.lengths.path: none: there is no such ledger"),
        (["simulation.lengths={kind: trace, path: old}"], "simulation.lengths.path: old/ledger.jsonl: its lines have"),
        (["simulation.lengths={kind: trace, path: bad}"], "simulation.lengths.path: bad/ledger.jsonl: line 1 is not"),
        (["simulation.lengths={kind: trace, path: new}"], "simulation.lengths.path: new/ledger.jsonl: no group was"),
        (["simulation.failures={mean_between_s: 0.001, recovery_s: 0}"], "simulation.failures.mean_between_s: 0.001 s"),
        (["--plot", "p.txt"], "--plot p.txt: the name must end in .png"),
        (["--plot", "none/p.png"], "--plot none/p.png: there is no folder none"),
        (["--save", "fit.yaml"], "--save writes what --calibrate has fitted; add --calibrate RUN_DIR"),
        (["--calibrate", "none"], "none: there is no such run folder"),
        (["--calibrate", "old"], "old: holds no recipe.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_user_errors_are_one_message_and_exit_code_2(
    recipe: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    for name, text in {"old": '{"event": "scored", "ordinal": 0}\n', "bad": "{\n", "new": ""}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "ledger.jsonl").write_text(text)
    code, output = run(str(recipe), "steps=2", *arguments)
    assert code == 2, output
    assert message in re.sub(r"\s+", " ", output)
    assert output.count("error: ") == 1


def test_only_rollouts_can_be_scheduled(tmp_path: Path) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text("kind: sft\nname: s\nsteps: 1\nbatch_size: 2\nmodel: {kind: tiny}\ndataset: {path: rows.jsonl}\n")
    assert run(str(path)) == (2, "error: simulate schedules rollouts, which a recipe of kind 'sft' has none of\n")
