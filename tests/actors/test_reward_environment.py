"""Reward functions see the user's environment without what is ours alone: Ray's token and the tracker's key."""

import asyncio
from pathlib import Path

import pytest

from actors.recipe.rewards import RewardConfig
from actors.reward import RewardActor
from tests.actors.test_reward import group

REWARD = """
import os

def seen(completions, **kwargs):
    names = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "WANDB_API_KEY", "JUDGE_API_KEY")
    return [float(sum(2 ** index for index, name in enumerate(names) if name in os.environ))] * len(completions)
"""


def test_a_reward_sees_neither_rays_token_nor_the_trackers_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reward.py").write_text(REWARD)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "WANDB_API_KEY", "JUDGE_API_KEY"):
        monkeypatch.setenv(name, "canary")
    actor = RewardActor((RewardConfig(function=f"{tmp_path}/reward.py:seen"),), 5.0)
    try:
        scored = asyncio.run(actor.score(group(), ["a", "b"]))
    finally:
        actor.close()
    assert scored.rewards_G == (8.0, 8.0), "the last of the four alone, which is the user's own"
