"""The check of a light engine's tokens accepts what it samples, and nothing else."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from actors.sampled import continued, unsampled
from algorithms.types import Prompt, Rollout
from tests.chaos.replica import LightEngine
from tests.chaos.tokens import wrong_tokens

PROMPT = Prompt(0, 0, (65, 66), "AB", {})


async def sample(swap: bool) -> list[Rollout]:
    """Four rollouts; the weights change in the middle of them when `swap`."""
    engine = LightEngine(seed=3)
    engine.worker.serving.digest = "old"
    await engine.update_weight_version("0")
    request = await engine.add_request(
        "a", {"prompt_token_ids": PROMPT.token_ids}, SimpleNamespace(n=4, max_tokens=9), None
    )
    if swap:
        await asyncio.sleep(0.01)
        await engine.pause_generation("keep", False)
        engine.worker.serving.digest = "new"
        await engine.update_weight_version("1")
        await engine.resume_generation()
    output = await request.get()
    return [continued(unsampled(PROMPT), completion) for completion in output.outputs]


@pytest.mark.parametrize("swap", [False, True])
def test_what_an_engine_samples_is_what_its_weights_say(swap: bool) -> None:
    rollouts = asyncio.run(sample(swap))
    assert [wrong_tokens(rollout, {0: "old", 1: "new"}, 3) for rollout in rollouts] == [0] * 4
    assert {rollout.finish_reason for rollout in rollouts} <= {"stop", "length"}
    longest = max(rollouts, key=lambda rollout: rollout.num_loss_tokens)
    assert len(longest.spans) == 1 + swap


def test_tokens_of_other_weights_are_found() -> None:
    for rollout in asyncio.run(sample(False)):
        count = rollout.num_loss_tokens
        assert wrong_tokens(rollout, {}, 3) == count, "the version is unknown"
        assert wrong_tokens(rollout, {0: "other"}, 3) >= 0.5 * count
        assert wrong_tokens(rollout, {0: "old"}, 4) >= 0.5 * count, "another seed"


def test_a_changed_token_is_found() -> None:
    rollout = max(asyncio.run(sample(False)), key=lambda rollout: rollout.num_loss_tokens)
    changed = rollout.token_ids_T.copy()
    changed[2] = (changed[2] + 4) % 240
    assert (
        wrong_tokens(
            Rollout(changed, rollout.loss_mask_T, np.zeros(len(changed), np.float32), rollout.spans, "stop"),
            {0: "old"},
            3,
        )
        >= 1
    )
