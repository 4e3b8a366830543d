"""What is fitted to a run are the times that the run was made with."""

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from actors.recipe.file import dump_recipe, load_recipe
from actors.recipe.plain_yaml import parse
from algorithms.simulation.replicas import Fleet, Group
from algorithms.slots import Slot
from deploy.__main__ import app
from deploy.simulate.calibrate import fit, least_squares
from deploy.simulate.record import read_run

BASE_S, PER_SEQUENCE_S = 0.02, 0.001
PER_STEP_S, PER_TOKEN_S = 1.5, 2.0e-4
STEP_S = 10.0
NUM_STEPS, SLOTS, GROUP_SIZE = 30, 8, 4

RECIPE = """
kind: grpo
name: case
steps: 30
groups_per_batch: 4
model: {kind: tiny}
dataset: {path: rows.jsonl}
rewards: {functions: [{function: "reward.py:f"}]}
algorithm: {num_generations: 4}
generation: {max_completion_length: 400}
staleness: {max_staleness: 2}
rollout: {max_num_seqs: 8}
pools: {policy: {num_workers: 2}, rollout: {num_workers: 2}}
"""


def sampled(load: list[int]) -> list[dict[str, object]]:
    """The ledger of groups that arrive so that `load[n]` are outstanding on replica n, until the run is over."""
    rng = random.Random(1)
    fleet = Fleet(len(load), SLOTS, BASE_S, PER_SEQUENCE_S)
    lines: list[dict[str, object]] = []
    began: dict[int, float] = {}

    def start(replica: int, now: float) -> None:
        ordinal = len(began)
        began[ordinal] = now
        lengths = [max(1, min(400, round(80 * rng.lognormvariate(0, 0.7)))) for _ in range(GROUP_SIZE)]
        fleet.start(Group(Slot(ordinal, 0, 0), lengths, replica), now)
        lines.append({"event": "dispatched", "ordinal": ordinal, "attempt": 0, "replica": replica, "t": now})

    for replica, outstanding in enumerate(load):
        for _ in range(outstanding):
            start(replica, 0.0)
    while (now := fleet.next_due()) < NUM_STEPS * STEP_S:
        for group in fleet.finish_due():
            fleet.leave(group)
            ordinal = group.slot.ordinal
            lines.append(
                {
                    "event": "scored", "ordinal": ordinal, "attempt": 0, "t": now + 0.25, "lengths": group.lengths,
                    "num_prompt_tokens": 20, "generate_s": now - began[ordinal], "score_s": 0.25,
                }
            )  # fmt: skip
            start(group.replica, now)
    return lines


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder made with known times: one replica is half full, the other queues."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    folder = tmp_path / "run"
    folder.mkdir()
    dump_recipe(load_recipe(tmp_path / "recipe.yaml"), folder / "recipe.yaml")
    lines = sampled([1, 5])
    metrics = []
    rng, num_tokens = random.Random(0), 0
    for step in range(NUM_STEPS):
        lines.append({"event": "trained", "ordinal": step, "step": step, "version": step + 1, "t": (step + 1) * STEP_S})
        tokens = rng.randint(2000, 6000)
        num_tokens += tokens
        metrics.append(
            {
                "step": step, "step_time": STEP_S, "sync/pause_s": 0.0, "sync/total_s": 0.75, "sync/stream_s": 0.7,
                "staleness/share/0": 0.25, "staleness/share/1": 0.75, "num_tokens": num_tokens,
                "time/policy_step_s": PER_STEP_S + PER_TOKEN_S * tokens / 2 + (30.0 if step == 0 else 0.0),
            }
        )  # fmt: skip
    write(folder / "ledger.jsonl", lines)
    write(folder / "metrics.jsonl", metrics)
    return folder


def write(path: Path, lines: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_times_are_found_again(run_dir: Path) -> None:
    config = fit(read_run(run_dir))
    assert config.decode.base_s == pytest.approx(BASE_S, rel=0.05)
    assert config.decode.per_sequence_s == pytest.approx(PER_SEQUENCE_S, rel=0.1)
    assert config.train.per_step_s == pytest.approx(PER_STEP_S, rel=0.01)
    assert config.train.per_token_s == pytest.approx(PER_TOKEN_S, rel=0.01)
    assert (config.sync.pause_s, config.sync.total_s) == (0.0, 0.75)
    assert (config.reward.kind, config.reward.mean_s) == ("constant", 0.25)
    assert (config.prompt_length, config.filtered_share) == (20, 0.0)


def test_a_critics_times_are_found_again(run_dir: Path) -> None:
    """Its values and its steps; the policy's step is fitted to the steps in which it learned, too."""
    recipe = run_dir / "recipe.yaml"
    critic = ("algorithm.advantage=gae", "algorithm.baseline=none", "algorithm.scale_rewards=none")
    dump_recipe(load_recipe(recipe, [*critic, "pools.critic={num_workers: 4}", "critic={warmup_steps: 5}"]), recipe)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    so_far = 0
    for line in lines:
        tokens, so_far = line["num_tokens"] - so_far, line["num_tokens"]
        line["time/critic_values_s"] = 0.5 + 4e-4 * tokens / 4
        line["time/critic_step_s"] = 2.0 + 8e-4 * tokens / 4
        if line["step"] < 5:
            line["time/policy_step_s"] = 0.01
    write(run_dir / "metrics.jsonl", lines)
    config = fit(read_run(run_dir))
    found = [config.critic.values, config.critic.train, config.train]
    assert [(part.per_step_s, part.per_token_s) for part in found] == [
        (pytest.approx(0.5, rel=0.01), pytest.approx(4e-4, rel=0.01)),
        (pytest.approx(2.0, rel=0.01), pytest.approx(8e-4, rel=0.01)),
        (pytest.approx(PER_STEP_S, rel=0.01), pytest.approx(PER_TOKEN_S, rel=0.01)),
    ]


@pytest.mark.parametrize("rest_s", [0.0, 0.75])
def test_pauses_do_not_count_as_decoding(run_dir: Path, rest_s: float) -> None:
    """The same run on a clock that stood still for a second at each swap, a part of it because the policy trained."""
    lines = [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]

    def later(at: float) -> float:
        return at + sum(at >= (step + 1) * STEP_S for step in range(NUM_STEPS))

    for line in lines:
        if line["event"] == "scored":
            end = line["t"] - line["score_s"]
            begin = end - line["generate_s"]
            line["generate_s"] = later(end) - later(begin)
            line["t"] = later(end) + line["score_s"]
        elif line["event"] == "trained":
            line["t"] += line["step"] + 1
    if rest_s:
        shared = load_recipe("recipe.yaml", ["pools.rollout.colocate_with=policy"])
        dump_recipe(shared, run_dir / "recipe.yaml")
    metrics = [json.loads(line) | {"sync/pause_s": 1.0 - rest_s, "sync/rest_s": rest_s, "sync/total_s": 1.5}
               for line in (run_dir / "metrics.jsonl").read_text().splitlines()]  # fmt: skip
    write(run_dir / "ledger.jsonl", lines)
    write(run_dir / "metrics.jsonl", metrics)
    config = fit(read_run(run_dir))
    assert config.decode.base_s == pytest.approx(BASE_S, rel=0.05)
    assert config.decode.per_sequence_s == pytest.approx(PER_SEQUENCE_S, rel=0.1)
    assert config.sync.pause_s == 1.0 - rest_s


def test_the_fit_is_printed_beside_what_it_predicts_and_can_be_pasted(run_dir: Path) -> None:
    result = CliRunner().invoke(app, ["simulate", "recipe.yaml", "steps=4", "--calibrate", "run", "--save", "fit.yaml"])
    assert result.exit_code == 0, result.output
    for text in ("run: predicted and measured", "mean step time", "10 s", "tokens of staleness 1", "75.0%"):
        assert text in result.output
    assert "4 steps in virtual time" in result.output
    assert "placeholders" not in result.output
    fitted = parse(Path("fit.yaml").read_text())
    Path("pasted.yaml").write_text(RECIPE + Path("fit.yaml").read_text())
    pasted = load_recipe("pasted.yaml").model_dump(mode="json")
    assert pasted["simulation"] == fitted["simulation"]
    assert fitted["simulation"]["lengths"] == {"kind": "trace", "path": "run"}
    shown = CliRunner().invoke(app, ["simulate", "recipe.yaml", "steps=4", "--calibrate", "run"])
    assert "\nsimulation:\n  lengths:\n" in shown.output


@pytest.mark.parametrize(
    ("file", "key", "message"),
    [
        ("ledger.jsonl", "lengths", "run/ledger.jsonl: its lines have no 'lengths': it is of an older Paceline"),
        ("ledger.jsonl", "t", "run/ledger.jsonl: its lines have no 't'"),
        ("ledger.jsonl", "generate_s", "run/ledger.jsonl: its lines have no 'generate_s'"),
        ("metrics.jsonl", "time/policy_step_s", "run/metrics.jsonl: its lines have no 'time/policy_step_s'"),
        ("metrics.jsonl", "sync/pause_s", "run/metrics.jsonl: its lines have no 'sync/pause_s'"),
    ],
)
def test_a_run_of_an_older_paceline_is_refused(run_dir: Path, file: str, key: str, message: str) -> None:
    lines = [json.loads(line) for line in (run_dir / file).read_text().splitlines()]
    write(run_dir / file, [{name: value for name, value in line.items() if name != key} for line in lines])
    result = CliRunner().invoke(app, ["simulate", "recipe.yaml", "--calibrate", "run"])
    assert result.exit_code == 2, result.output
    assert message in result.output


def test_a_run_that_ended_at_once_is_refused(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text((run_dir / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    result = CliRunner().invoke(app, ["simulate", "recipe.yaml", "--calibrate", "run"])
    assert (result.exit_code, "at least 2 steps are needed" in result.output) == (2, True), result.output


def test_least_squares_never_goes_below_zero() -> None:
    one = [1.0, 1.0, 1.0]
    assert least_squares([1.0, 2.0, 3.0], [5.0, 7.0, 9.0], one) == pytest.approx((3.0, 2.0))
    assert least_squares([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], one) == (2.0, 0.0)
    assert least_squares([4.0, 4.0, 4.0], [3.0, 2.0, 1.0], one) == (2.0, 0.0)
    constant, slope = least_squares([1.0, 2.0, 3.0], [0.5, 3.0, 5.5], one)
    assert (constant, slope > 1.5) == (0.0, True)
