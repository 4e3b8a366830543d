"""A choice that contradicts another is refused with the key and the way out, and what is sound is not."""

from typing import Any

import pytest
from pydantic import ValidationError

from algorithms.config import GrpoConfig

GAE = {"advantage": "gae", "baseline": "none", "scale_rewards": "none"}
ALONE = {"num_generations": 1, "baseline": "none", "scale_rewards": "none"}
CLIP_MIN, CLIP_MAX = "vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max"
SAMPLED = {"old_logprobs": "sampled", "vllm_importance_sampling_correction": False}


@pytest.mark.parametrize(
    ("keys", "key", "way_out"),
    [
        ({"num_generations": 1}, "num_generations", "baseline to 'none'"),
        ({"baseline": "leave_one_out"}, "scale_rewards", "set scale_rewards to 'none'"),
        ({"baseline": "none", "scale_rewards": "batch"}, "scale_rewards", "set scale_rewards to 'none'"),
        ({"normalize_advantages": "tokens"}, "normalize_advantages", "set scale_rewards to 'none'"),
        ({"kl_penalty": "k2"}, "kl_penalty", "set beta"),
        ({"kl_penalty": "advantage"}, "kl_penalty", "set beta"),
        ({"kl_penalty": "reward_to_go", "beta": 0.1}, "kl_penalty", "normalize_advantages to 'tokens' or 'none'"),
        (
            {"kl_penalty": "reward_to_go", "beta": 0.1, "scale_rewards": "none", "normalize_advantages": "rollouts"},
            "kl_penalty",
            "normalize_advantages to 'tokens' or 'none'",
        ),
        ({"gamma": 0.9}, "gamma", "set advantage to 'gae'"),
        ({"lam": 1.0}, "lam", "set advantage to 'gae'"),
        ({"advantage": "gae"}, "advantage", "baseline and scale_rewards to 'none'"),
        (GAE | {"dynamic_sampling": {"kind": "zero_std"}}, "dynamic_sampling", "'reward_band'"),
        (GAE | {"normalize_advantages": "rollouts"}, "normalize_advantages", "'tokens' or 'none'"),
        (GAE | {"kl_penalty": "reward_to_go", "beta": 0.1}, "kl_penalty", "'reward'"),
        (GAE | {"kl_penalty": "advantage", "beta": 0.1}, "kl_penalty", "'reward'"),
        ({"loss_type": "cispo"}, "epsilon_high", "such as 5.0"),
        ({"loss_type": "cispo", "epsilon_high": 0.28}, "epsilon_high", "such as 5.0"),
        ({"loss_type": "cispo", "epsilon_high": 5.0, "delta": 6.0}, "delta", "leave delta out"),
        ({"delta": 1.2}, "delta", "raise delta"),
        ({"delta": 1.25, "epsilon_high": 0.28}, "delta", "raise delta"),
        ({"old_logprobs": "sampled"}, "old_logprobs", "set vllm_importance_sampling_correction to false"),
        (
            {"old_logprobs": "interpolated", "vllm_importance_sampling_correction": False},
            "old_logprobs",
            "set vllm_importance_sampling_correction to true",
        ),
        ({"geometric_mask_range": (1.0, 1.1)}, "geometric_mask_range", "such as [0.99, 1.01]"),
        ({"geometric_mask_range": (0.5, 0.9)}, "geometric_mask_range", "such as [0.99, 1.01]"),
        ({CLIP_MIN: 3.0}, CLIP_MIN, "lower it"),
        ({CLIP_MIN: 1.5}, CLIP_MIN, "lower it below 1"),
        ({CLIP_MAX: 0.5}, CLIP_MAX, "raise it above 1"),
        ({CLIP_MAX: 1.0, "vllm_importance_sampling_mode": "token_mask"}, CLIP_MAX, "raise it above 1"),
        (ALONE | {"dynamic_sampling": {"kind": "zero_std"}}, "dynamic_sampling", "leave dynamic_sampling out"),
    ],
)
def test_a_contradiction_names_the_key_and_the_way_out(keys: dict[str, Any], key: str, way_out: str) -> None:
    with pytest.raises(ValidationError) as error:
        GrpoConfig(**keys)
    (only,) = error.value.errors()
    assert only["msg"].startswith(f"Value error, {key}: ")
    assert way_out in only["msg"]


@pytest.mark.parametrize(
    "keys",
    [
        {},
        ALONE,
        ALONE | {"dynamic_sampling": {"kind": "reward_band", "min": 0.1, "max": 0.9}},
        {CLIP_MAX: 1.0, "vllm_importance_sampling_mode": "token_truncate"},
        {CLIP_MIN: 0.5, CLIP_MAX: None},
        {"baseline": "leave_one_out", "scale_rewards": "none", "normalize_advantages": "rollouts"},
        {"kl_penalty": "reward_to_go", "beta": 0.1, "scale_rewards": "none"},
        {"kl_penalty": "advantage", "beta": 1.0},
        GAE | {"num_generations": 1, "gamma": 0.99, "lam": 1.0, "normalize_advantages": "tokens"},
        GAE | {"kl_penalty": "reward", "beta": 0.05},
        {"delta": 1.3, "epsilon_high": 0.28},
        SAMPLED | {"geometric_mask_range": (0.9, 1.1), "off_policy_mask_threshold": 0.1},
        {"old_logprobs": "interpolated", "num_iterations": 4, "geometric_mask_range": (0.9, 1.1)},
    ],
)
def test_what_is_sound_is_taken(keys: dict[str, Any]) -> None:
    assert GrpoConfig(**keys).model_dump(exclude_unset=True) == keys
