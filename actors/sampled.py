"""What is sampled of a rollout so far, and how it goes on: every token keeps its log-probability and its version."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from algorithms.types import Group, Prompt, Rollout, VersionSpan

INTERRUPTED = "interrupted"
"""Finish reason of a rollout that is not finished."""


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A group came back before its end; no token that it had sampled is lost, and none was sampled after."""

    ordinal: int
    attempt: int
    replica: int
    num_loss_tokens_G: tuple[int, ...]
    """Sampled so far, earlier replicas included."""
    oldest_version: int | None
    """None when nothing was sampled yet."""
    newest_version: int | None
    generate_s: float
    """On this replica; what earlier ones spent is not in it."""


def unsampled(prompt: Prompt) -> Rollout:
    """A rollout of which nothing is sampled: the prompt alone."""
    num_prompt = len(prompt.token_ids)
    return Rollout(
        token_ids_T=np.array(prompt.token_ids, np.int32),
        loss_mask_T=np.zeros(num_prompt, np.bool_),
        logprobs_T=np.zeros(num_prompt, np.float32),
        spans=(),
        finish_reason=INTERRUPTED,
    )


def at_limit(rollout: Rollout, limit: int) -> Rollout:
    """The rollout, finished by `length` if it has no token left to sample."""
    if rollout.finish_reason == INTERRUPTED and rollout.num_loss_tokens >= limit:
        return replace(rollout, finish_reason="length")
    return rollout


def continued(rollout: Rollout, completion: Any) -> Rollout:
    """The rollout and, behind it, what vLLM sampled from there: one version span wherever the weights stayed."""
    num_before, num_sampled = rollout.num_tokens, len(completion.token_ids)
    flat = completion.logprobs  # of `flat_logprobs`: lists for all tokens in a row, where an object each would be slow
    assert flat.token_ids == list(completion.token_ids), "there is a log-probability of each sampled token alone"
    spans = [
        VersionSpan(int(span.version), num_before + span.start, num_before + span.end)
        for span in completion.weight_versions
    ]
    assert sum(span.stop - span.start for span in spans) == num_sampled, "every sampled token has a version"
    if completion.finish_reason == "error":
        raise RuntimeError("vLLM could not finish a request")
    return Rollout(
        token_ids_T=np.concatenate([rollout.token_ids_T, np.fromiter(completion.token_ids, np.int32)]),
        loss_mask_T=np.concatenate([rollout.loss_mask_T, np.ones(num_sampled, np.bool_)]),
        logprobs_T=np.concatenate([rollout.logprobs_T, np.fromiter(flat.logprobs, np.float32, num_sampled)]),
        spans=_merged([*rollout.spans, *spans]),
        finish_reason=INTERRUPTED if completion.finish_reason == "abort" else str(completion.finish_reason),
    )


def _merged(spans: Sequence[VersionSpan]) -> tuple[VersionSpan, ...]:
    """The same tokens in the fewest spans: those of one version that touch become one."""
    merged: list[VersionSpan] = []
    for span in spans:
        if merged and merged[-1].version == span.version and merged[-1].stop == span.start:
            merged[-1] = replace(merged[-1], stop=span.stop)
        else:
            merged.append(span)
    return tuple(merged)


def interrupted(group: Group, generate_s: float) -> Interrupted:
    versions = [span.version for rollout in group.rollouts for span in rollout.spans]
    return Interrupted(
        ordinal=group.prompt.ordinal,
        attempt=group.attempt,
        replica=group.replica,
        num_loss_tokens_G=tuple(rollout.num_loss_tokens for rollout in group.rollouts),
        oldest_version=min(versions, default=None),
        newest_version=max(versions, default=None),
        generate_s=generate_s,
    )
