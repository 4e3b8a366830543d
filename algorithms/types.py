"""Every rollout that is sampled travels through these types, and all per-token arrays of one rollout have one length.

Prompt -> Group (n rollouts) -> ScoredGroup -> Batch -> Update -> the next weight version.

Legend for shapes: T = tokens of one sequence (prompt and completion), L = its loss tokens, G = rollouts of one group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Messages = list[dict[str, Any]]
"""A conversation: `[{"role": ..., "content": ...}, ...]`."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question to the policy; the ordinal names it for ever: it is a pure function of (seed, epoch, position)."""

    ordinal: int
    epoch: int
    token_ids: tuple[int, ...]
    text: str | Messages
    """What reward functions see as the prompt: a string, or messages when the dataset is conversational."""
    columns: Mapping[str, Any]
    """The other columns of the dataset row, handed to the reward functions."""


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens [start, stop) of the sequence were sampled by weights `version`."""

    version: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled sequence; a token is trained iff its loss mask is set, and then its log-probability is known."""

    token_ids_T: NDArray[np.int32]
    loss_mask_T: NDArray[np.bool_]
    """False on the prompt; the policy is trained on True tokens alone."""
    logprobs_T: NDArray[np.float32]
    """Log-probability of each token under the weights that sampled it; 0 where the loss mask is False."""
    spans: tuple[VersionSpan, ...]
    """Which weight version sampled which tokens; together they cover the sampled tokens, in order."""
    finish_reason: str
    """`stop` (the policy ended the sequence) or `length` (the limit did)."""
    reference_logprobs_T: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids_T), len(self.loss_mask_T), len(self.logprobs_T)}
        if self.reference_logprobs_T is not None:
            lengths.add(len(self.reference_logprobs_T))
        assert len(lengths) == 1, f"per-token arrays of one rollout have one length, got {sorted(lengths)}"

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_T)

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask_T.sum())

    @property
    def completion_ids(self) -> list[int]:
        return [int(token) for token in self.token_ids_T[self.loss_mask_T]]


@dataclass(frozen=True, slots=True)
class Group:
    """The rollouts of one prompt, all from one replica; advantages compare rollouts of one group only."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    attempt: int
    replica: int


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group and its rewards; None is unscorable: out of the baseline, advantage 0. A failure is never 0."""

    group: Group
    rewards_G: tuple[float | None, ...]
    """Weighted sum of the reward functions; None when every function returned None for that rollout, or one that
    counts (its weight is not 0) has failed for it."""
    scores: Mapping[str, tuple[float | None, ...]]
    """What each reward function gave, by function name."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Failed reward calls by cause: `timeout`, `exception`, `memory`, `died`, `bad_output`."""
    completions: tuple[str, ...] = ()
    """The completions as text, for the sample log."""
    notes: tuple[str, ...] = ()
    """What the user should read of the failures; each function and cause is told once."""
    details: tuple[str, ...] = ()
    """What each function that failed said, and its name."""


@dataclass(frozen=True, slots=True)
class KlSums:
    """Of one rollout, over its loss tokens, the estimate log(sampled / reference probability) of the KL divergence."""

    total: float = 0.0
    to_go: float = 0.0
    """The sum over the tokens of what is still to come at each, itself included."""
    to_go_squared: float = 0.0
    """The sum of the squares of the same."""


@dataclass(frozen=True, slots=True)
class GroupSummary:
    """What the controller needs to know of a group; the tokens themselves stay behind an object reference."""

    ordinal: int
    epoch: int
    attempt: int
    replica: int
    num_tokens_G: tuple[int, ...]
    num_loss_tokens_G: tuple[int, ...]
    num_prompt_tokens: int
    truncated_G: tuple[bool, ...]
    tokens_by_version_G: tuple[Mapping[int, int], ...]
    """How many sampled tokens of each rollout came from each weight version."""
    rewards_G: tuple[float | None, ...]
    scores: Mapping[str, tuple[float | None, ...]]
    failures: Mapping[str, int]
    generate_s: float
    score_s: float
    notes: tuple[str, ...] = ()
    details: tuple[str, ...] = ()
    kl_G: tuple[KlSums, ...] = ()
    """Empty where no reference was asked."""

    @property
    def tokens_by_version(self) -> dict[int, int]:
        """The same over the whole group."""
        total: dict[int, int] = {}
        for tokens_by_version in self.tokens_by_version_G:
            for version, num_tokens in tokens_by_version.items():
                total[version] = total.get(version, 0) + num_tokens
        return total

    @property
    def oldest_version(self) -> int:
        return min(map(min, filter(None, self.tokens_by_version_G)))

    @property
    def newest_version(self) -> int:
        return max(map(max, filter(None, self.tokens_by_version_G)))


def summarize(scored: ScoredGroup, generate_s: float, score_s: float) -> GroupSummary:
    """The summary of a scored group; pure bookkeeping over its rollouts."""
    group = scored.group
    return GroupSummary(
        ordinal=group.prompt.ordinal,
        epoch=group.prompt.epoch,
        attempt=group.attempt,
        replica=group.replica,
        num_tokens_G=tuple(rollout.num_tokens for rollout in group.rollouts),
        num_loss_tokens_G=tuple(rollout.num_loss_tokens for rollout in group.rollouts),
        num_prompt_tokens=len(group.prompt.token_ids),
        truncated_G=tuple(rollout.finish_reason == "length" for rollout in group.rollouts),
        tokens_by_version_G=tuple(map(_tokens_by_version, group.rollouts)),
        rewards_G=scored.rewards_G,
        scores=scored.scores,
        failures=scored.failures,
        generate_s=generate_s,
        score_s=score_s,
        notes=scored.notes,
        details=scored.details,
        kl_G=tuple(_kl_of(r, r.reference_logprobs_T) for r in group.rollouts if r.reference_logprobs_T is not None),
    )


def _kl_of(rollout: Rollout, reference_logprobs_T: NDArray[np.float32]) -> KlSums:
    kl_T = rollout.logprobs_T.astype(np.float64) - reference_logprobs_T
    return kl_sums(kl_T[rollout.loss_mask_T])


def kl_sums(kl_L: NDArray[np.float64]) -> KlSums:
    """Of the estimates of a rollout's loss tokens."""
    to_go_L = kl_L[::-1].cumsum()  # from the last token to the first
    total = float(to_go_L[-1]) if len(to_go_L) else 0.0
    return KlSums(total, float(to_go_L.sum()), float((to_go_L**2).sum()))


def _tokens_by_version(rollout: Rollout) -> dict[int, int]:
    counts: dict[int, int] = {}
    for span in rollout.spans:
        if span.stop > span.start:
            counts[span.version] = counts.get(span.version, 0) + span.stop - span.start
    return counts


@dataclass(frozen=True, slots=True)
class Sample:
    """One rollout of the batch by its place: rollout `rollout` of the batch's group `group`."""

    group: int
    rollout: int
    num_tokens: int
    advantage: float
    advantages_L: NDArray[np.float32] | None = None
    """One for each loss token, where a critic tells tokens apart; None: `advantage` holds for all of them."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples that one rank packs into one forward pass; may be empty, so that all ranks make equally many passes."""

    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Over all ranks each rollout exactly once; the counts are over the global batch, before any rejection."""

    version: int
    """The version the policy holds when it trains on this batch; the update makes version + 1."""
    ranks: tuple[tuple[MicroBatch, ...], ...]
    """`ranks[r]` are the micro-batches of policy rank r, or of the r-th team of ranks that compute each pass together;
    all have equally many."""
    num_sequences: int
    num_loss_tokens: int
    """Tokens of all samples; the stale ones, which leave the loss, are among them."""
    oldest_version: int
    """Tokens sampled by weights older than this leave the loss; at 0 none does."""
    kl_weight: float = 0.0
    """Of the KL estimate in each token's advantage, where the recipe puts it there."""


def num_trained_tokens(batch: Batch, groups: Sequence[GroupSummary]) -> int:
    """How many sampled tokens of the batch's samples are in its loss: those not older than its oldest version.

    Samples of no group of these were sampled by nobody.
    """
    return sum(
        num_tokens
        for rank in batch.ranks
        for micro_batch in rank
        for sample in micro_batch.samples
        if sample.group < len(groups)
        for version, num_tokens in groups[sample.group].tokens_by_version_G[sample.rollout].items()
        if version >= batch.oldest_version
    )


@dataclass(frozen=True, slots=True)
class Update:
    """One optimizer step: version = previous version + 1; only the policy increments it."""

    step: int
    version: int
    metrics: Mapping[str, float]
    """Under TRL's metric names: `loss`, `grad_norm`, `learning_rate`, `entropy`, `kl`, `clip_ratio/*`, `sampling/*`.
    Every value is finite; one that is not is left out."""
    skipped: bool = False
    """Loss or gradient were not finite: the batch is completed, and the weights are those of the version before."""
