"""What is compared with what, and how the figures are made of it; the runs themselves are the benchmark's."""

import json
import math
import random
from pathlib import Path
from statistics import fmean

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.recipe.file import load_recipe
from actors.recipe.pools import used_pools
from actors.recipe.schema import GrpoRecipe
from benchmarks import end_to_end
from benchmarks.end_to_end import cases, curve, ratio, reward_gap, write_prompts
from benchmarks.end_to_end_case import Case, Measured
from benchmarks.end_to_end_model import MAX_LENGTH, MEAN_LENGTH, NUM_PROMPT_TOKENS, hazards, make_stopping, mean_length
from benchmarks.end_to_end_rewards import LONGEST_S, wait_s
from benchmarks.end_to_end_sides import read_metrics, recipe_of

CASES = [*cases(None, quick=False).values(), *cases(None, quick=True).values(), curve(1, None, quick=False)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_is_a_recipe_with_the_same_load(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(case, tmp_path / "run")))
    recipe = load_recipe(str(path))
    assert isinstance(recipe, GrpoRecipe)
    assert recipe.groups_per_batch * recipe.algorithm.num_generations == 256
    assert recipe.generation.max_completion_length == case.max_completion_length
    assert sum(pool.cpus_per_worker * pool.num_workers for pool in used_pools(recipe).values()) <= 2


def test_a_run_goes_on_for_as_many_steps_as_were_sampled_ahead(tmp_path: Path) -> None:
    for name, num_ahead in (("short", 3), ("long", 4)):
        case = cases(None, quick=False)[name]
        assert recipe_of(case, tmp_path)["steps"] == case.num_steps + num_ahead
    assert recipe_of(curve(0, 40, quick=False), tmp_path)["steps"] == 42


def measured(samples_per_s: float) -> Measured:
    return Measured(
        samples_per_s=samples_per_s, step_s=1.0, num_steps=1, mean_length=1.0, max_length=1.0, rewards=[0.0]
    )


def test_what_was_tried_for_a_step_does_not_count() -> None:
    sides = {"TRL, generate, tried": measured(5.0), "TRL": measured(20.0), "Paceline": measured(30.0)}
    assert ratio(sides) == 1.5


def test_the_gap_is_in_standard_deviations_of_the_final_rewards() -> None:
    rises = [[0.0, 0.0, 0.0, final] for final in (0.4, 0.5, 0.6)]
    higher = [[0.0, 0.0, 0.0, final] for final in (0.7, 0.8, 0.9)]
    assert reward_gap(rises, rises) == 0.0
    assert math.isclose(reward_gap(rises, higher), 3.0)
    assert math.isclose(reward_gap(higher, rises), 3.0)


def step(seconds: float, ready: float, in_flight: float = 0.0) -> dict[str, float]:
    return {
        "step_time": seconds, "groups/ready": ready, "groups/in_flight": in_flight,
        "completions/mean_length": 40.0, "completions/max_length": 64.0, "staleness/mean": 1.0, "staleness/max": 1.0,
        "reward": 0.5, "wait/policy/groups_s": 1.0,
    }  # fmt: skip


def test_neither_the_start_nor_the_end_nor_a_stock_of_samples_counts() -> None:
    case = cases(2, quick=True)["short"]  # one step of warm-up, two that count
    steady = [step(100.0, 8.0), step(2.0, 8.0), step(2.0, 8.0), step(0.1, 0.0), step(0.1, 0.0)]
    assert read_metrics(case, steady).samples_per_s == 128.0
    assert read_metrics(case, steady).notes["wait/policy/groups_s"] == 0.5
    living_on_a_stock = [step(100.0, 40.0), *steady[1:]]
    assert read_metrics(case, living_on_a_stock).samples_per_s == 64.0
    half_done = [step(100.0, 40.0), steady[1], step(2.0, 8.0, in_flight=64.0), *steady[3:]]
    assert read_metrics(case, half_done).samples_per_s == 128.0
    nothing_left = [step(100.0, 8.0, in_flight=64.0), *steady[1:]]
    assert read_metrics(case, nothing_left).samples_per_s == 64.0
    filling_up = [step(100.0, 0.0), *steady[1:]]
    assert read_metrics(case, filling_up).samples_per_s == 128.0


def test_rewards_wait_a_second_on_average() -> None:
    drawn = random.Random(0)
    waits = [wait_s(str(drawn.random())) for _ in range(4000)]
    assert 0.9 < fmean(waits) < 1.1
    assert max(waits) <= LONGEST_S
    assert wait_s("one") == wait_s("one")


def test_completions_of_the_model_end_as_they_should(tmp_path: Path) -> None:
    """The probability of an end along random text, against what was asked for."""
    make_stopping(tmp_path / "model", seed=0)
    wanted_T = hazards(MAX_LENGTH)
    assert math.isclose(mean_length(wanted_T), MEAN_LENGTH, abs_tol=0.1)
    write_prompts(tmp_path / "prompts.jsonl")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    first = tokenizer("#")["input_ids"][0]
    text = torch.randint(36, 256, (4, NUM_PROMPT_TOKENS + MAX_LENGTH - 1), generator=torch.Generator().manual_seed(1))
    text[:, 0] = first
    with torch.no_grad():
        probabilities = torch.softmax(model(text).logits[:, NUM_PROMPT_TOKENS - 1 :], -1)
    ends = torch.tensor(model.generation_config.eos_token_id)
    hazard_T = probabilities[..., ends].sum(-1).mean(0)
    assert 0.8 * MEAN_LENGTH < mean_length(hazard_T) < 1.25 * MEAN_LENGTH
    assert torch.allclose(hazard_T, wanted_T, rtol=0.5)
    assert probabilities[..., first].max() < 1e-5, "no completion may look like the beginning of a prompt"


def test_the_last_line_has_every_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All parts, in turn, with sides that only say how fast they were."""
    monkeypatch.setattr(end_to_end, "OUT", tmp_path)
    monkeypatch.setattr(end_to_end.os, "sched_setaffinity", lambda pid, cores: None)
    monkeypatch.setattr(end_to_end, "make_stopping", lambda folder, seed: None)
    asked: list[str] = []

    def trl(case: Case, folder: Path, timeout_s: float) -> Measured:
        asked.append(f"{case.name}, {case.trl_mode}, {case.trl_steps}")
        fast = case.trl_mode == "generate" or case.name == "long"
        return measured(10.0 if fast else 1.0).model_copy(update={"rewards": [0.1, 0.2, 0.3, 0.4 + case.seed]})

    def paceline(case: Case, folder: Path, timeout_s: float) -> Measured:
        asked.append(f"{case.name}, Paceline")
        return measured(25.0).model_copy(update={"rewards": [0.1, 0.2, 0.3, 0.4 + case.seed]})

    monkeypatch.setattr(end_to_end, "trl", trl)
    monkeypatch.setattr(end_to_end, "paceline", paceline)
    monkeypatch.setattr("sys.argv", ["end_to_end", "--quick", "--seeds", "2"])
    end_to_end.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "over_trl_short": 2.5, "over_trl_long": 2.5, "over_trl_slow_reward": 2.5, "reward_gap": 0.0,
    }  # fmt: skip
    assert asked[:4] == ["short, generate, 2", "short, continuous batching, 2", "short, generate, 3", "short, Paceline"]
    assert asked[-2:] == ["curve-1, generate, 4", "curve-1, Paceline"]
