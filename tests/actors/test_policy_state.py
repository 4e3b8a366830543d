"""What is not finite is found in every weight and every moment, whatever is beside it."""

import math

import pytest
import torch

from actors.policy_state import PolicyState


def state() -> PolicyState:
    weights = {"embed": torch.ones(3, 2), "empty": torch.empty(0), "head": torch.full((4,), -3e38)}
    moments = {f"{name}.{moment}": value.clone() for name, value in weights.items() for moment in ("m", "v")}
    return PolicyState(1, weights, moments, {}, 1, {})


def test_a_state_of_finite_numbers_is_fine() -> None:
    assert state().spoiled() is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["embed", "head", "embed.m", "head.v"])
def test_one_number_that_is_not_finite_is_found_and_named(name: str, value: float) -> None:
    spoiled = state()
    tensors = spoiled.weights if name in spoiled.weights else spoiled.moments
    tensors[name].view(-1)[-1] = value
    assert spoiled.spoiled() == name
