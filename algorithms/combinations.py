"""Which choices of a recipe contradict one another: each refusal names the key, and the way out."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from algorithms.config import GrpoConfig


def refusals(config: "GrpoConfig") -> Iterator[str]:
    """What is wrong with the choices; the first is what the user reads."""
    yield from _of_gae(config)
    yield from _of_advantages(config)
    yield from _of_the_kl(config)
    yield from _of_clipping(config)
    yield from _of_corrections(config)
    if config.vllm_importance_sampling_correction:
        yield from _of_bounds(config)


def _of_advantages(config: "GrpoConfig") -> Iterator[str]:
    baseline, scale, normal = config.baseline, config.scale_rewards, config.normalize_advantages
    if baseline != "none" and config.num_generations < 2:
        yield (
            f"num_generations: the advantage is measured against the group's mean, which needs at least 2 rollouts a "
            f"prompt, got {config.num_generations}; set num_generations to 2 or more, or baseline to 'none'"
        )
    dynamic = config.dynamic_sampling
    if config.num_generations == 1 and dynamic is not None and dynamic.kind == "zero_std":
        yield (
            "dynamic_sampling: the only reward of a group never differs from another, so 'zero_std' would leave out "
            "every group; leave dynamic_sampling out, or set num_generations to 2 or more"
        )
    if scale != "none" and baseline != "group":
        yield (
            f"scale_rewards: {scale!r} divides what was measured against the group's mean, but baseline is "
            f"{baseline!r}; set scale_rewards to 'none' (normalize_advantages scales over the batch)"
        )
    if scale != "none" and normal != "none":
        yield (
            f"normalize_advantages: {normal!r} would scale a second time what scale_rewards {scale!r} has scaled; set "
            "scale_rewards to 'none'"
        )


def _of_gae(config: "GrpoConfig") -> Iterator[str]:
    if config.advantage != "gae":
        for key, value, default in (("gamma", config.gamma, 1.0), ("lam", config.lam, 0.95)):
            if value != default:
                yield f"{key}: only a critic's values are discounted; set advantage to 'gae', or leave {key} out"
        return
    if config.baseline != "none" or config.scale_rewards != "none":
        yield (
            "advantage: with 'gae' the critic is the baseline, and nothing is compared within a group; set both "
            "baseline and scale_rewards to 'none'"
        )
    if config.dynamic_sampling is not None and config.dynamic_sampling.kind == "zero_std":
        yield (
            "dynamic_sampling: 'zero_std' leaves out groups of equal rewards, which say nothing only where a group is "
            "the baseline; with advantage 'gae' leave dynamic_sampling out, or take 'reward_band'"
        )
    if config.normalize_advantages == "rollouts":
        yield (
            "normalize_advantages: 'rollouts' scales whole rollouts, and with advantage 'gae' every token has an "
            "advantage of its own; set it to 'tokens' or 'none'"
        )
    if config.kl_penalty in ("reward_to_go", "advantage"):
        yield (
            f"kl_penalty: {config.kl_penalty!r} adds to advantages that advantage 'gae' has estimated; set kl_penalty "
            "to 'reward', where each token's KL is part of what the critic learns, or to 'k2' or 'k3'"
        )


def _of_the_kl(config: "GrpoConfig") -> Iterator[str]:
    penalty = config.kl_penalty
    if penalty != "k3" and config.beta == 0:
        yield f"kl_penalty: {penalty!r} has no weight when beta is 0; set beta, or leave kl_penalty out"
    if penalty == "reward_to_go" and (config.scale_rewards != "none" or config.normalize_advantages == "rollouts"):
        yield (
            "kl_penalty: 'reward_to_go' gives every token an advantage of its own, which cannot be scaled by rollouts; "
            "set scale_rewards to 'none', and normalize_advantages to 'tokens' or 'none'"
        )


def _of_clipping(config: "GrpoConfig") -> Iterator[str]:
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    if config.loss_type == "cispo":
        if high < 1:
            yield (
                f"epsilon_high: with loss_type 'cispo' it is the largest ratio itself, and {high:g} would cut off the "
                "weight of every token; set epsilon_high to 1 or more, such as 5.0"
            )
        if config.delta is not None:
            yield "delta: loss_type 'cispo' bounds the weight of every token already; leave delta out"
    elif config.delta is not None and config.delta <= 1 + high:
        yield (
            f"delta: {config.delta:g} is not above 1 + epsilon_high = {1 + high:g}, where rewarded tokens are clipped; "
            "raise delta, such as to 3.0"
        )


def _of_corrections(config: "GrpoConfig") -> Iterator[str]:
    if config.old_logprobs == "sampled" and config.vllm_importance_sampling_correction:
        yield (
            "old_logprobs: 'sampled' already corrects for the sampling weights, so the importance weights would be "
            "applied twice; set vllm_importance_sampling_correction to false"
        )
    if config.old_logprobs == "interpolated" and not config.vllm_importance_sampling_correction:
        yield (
            "old_logprobs: 'interpolated' leaves it to the importance weights to correct for the sampling weights; set "
            "vllm_importance_sampling_correction to true"
        )
    bounds = config.geometric_mask_range
    if bounds is not None and not 0 <= bounds[0] < 1 < bounds[1]:
        yield (
            f"geometric_mask_range: [{bounds[0]:g}, {bounds[1]:g}] does not lie around 1, the ratio of a sequence that "
            "is on policy; set it to such as [0.99, 1.01]"
        )


def _of_bounds(config: "GrpoConfig") -> Iterator[str]:
    low, high = config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max
    if low is not None and high is not None and low >= high:
        yield (
            f"vllm_importance_sampling_clip_min: {low:g} is not below vllm_importance_sampling_clip_max {high:g}, so "
            "no weight lies between them; lower it"
        )
    if config.vllm_importance_sampling_mode not in ("token_mask", "sequence_mask"):
        return
    for key, bound, is_sound, way in (
        ("clip_min", low, (low or 0.0) < 1, "lower it below 1"),
        ("clip_max", high, (high or math.inf) > 1, "raise it above 1"),
    ):
        if not is_sound:
            yield (
                f"vllm_importance_sampling_{key}: {bound:g} leaves out what is on policy, whose weights lie around "
                f"1, or half of it; {way}"
            )
