"""A replica that computes another model than the policy is found before the run, and one that does not passes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from actors.settings import ModelSource
from deploy.doctor.engines import check_agreement, engine_logprobs, judged, policy_logprobs, settings_of
from tests.deploy.doctor.recipes import recipe_of
from tests.prove import ONLY_PROVE

OURS = [-1.0, -2.0, -3.0, -4.0]


@pytest.mark.parametrize(
    ("theirs", "is_exact", "level"),
    [
        (OURS, True, "pass"),
        ([-1.0, -2.0, -3.0, -4.001], True, "pass"),
        ([-1.0, -2.0, -3.0, -4.01], True, "fail"),
        ([-1.02, -2.0, -3.05, -4.0], False, "pass"),
        ([-1.1, -2.1, -3.0, -4.0], False, "warn"),
        ([-1.3, -2.3, -3.3, -4.0], False, "fail"),
        ([-1.0, -2.0, float("nan"), -4.0], False, "fail"),
        ([-1.0, -2.0, float("-inf"), -4.0], True, "fail"),
    ],
)
def test_a_difference_is_judged_by_how_exactly_both_compute(
    theirs: Sequence[float], is_exact: bool, level: str
) -> None:
    assert judged(OURS, theirs, is_exact).level == level


def test_without_ray_nothing_is_compared(tmp_path: Path) -> None:
    import ray

    assert not ray.is_initialized()
    assert check_agreement(recipe_of(tmp_path), None).level == "skip"


def test_both_sides_are_told_the_same_model_at_temperature_one(tmp_path: Path) -> None:
    """And neither the adapter, which is nothing yet, nor a reference of the recipe's own."""
    lora = ("policy.lora={r: 4, lora_alpha: 8}", "algorithm.beta=0.1", "reference={kind: pretrained, path: other}")
    recipe = recipe_of(tmp_path, *lora, "generation.temperature=1.3", "policy.dtype=bfloat16")
    policy, rollout = settings_of(recipe, ModelSource("the-model", "abc"))
    assert (policy.model_path, policy.revision) == (rollout.model_path, rollout.revision) == ("the-model", "abc")
    assert (policy.temperature, rollout.generation.temperature) == (1.0, 1.0)
    assert rollout.lora is None
    assert (policy.dtype, policy.use_gpu, rollout.use_gpu) == ("bfloat16", False, False)


@ONLY_PROVE
@pytest.mark.cluster
def test_an_engine_and_the_policy_are_compared(local_ray: None, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """The recipe's own, and then an engine that was given other weights."""
    model = f"model={{kind: pretrained, path: {tiny_models['untied']}}}"
    recipe = recipe_of(tmp_path, model, "generation.temperature=1.3")
    found = check_agreement(recipe, None)
    assert found.level == "pass", found
    assert list(tmp_path.glob(".doctor-*")) == []
    policy, rollout = settings_of(recipe, ModelSource(str(tiny_models["untied"])))
    tokens = list(range(40, 80))
    ours = policy_logprobs(policy, tokens, recipe)
    theirs = engine_logprobs(replace(rollout, model_path=str(tiny_models["other"])), tokens, recipe)
    assert judged(ours, theirs, is_exact=True).level == "fail"
