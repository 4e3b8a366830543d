"""Sequences packed into one row never see each other: positions restart at 0 and attention stays inside each.

Neighbours with the same prompt share it: its tokens lie in the row once, with the first of them, and are computed once.

Legend: T = tokens of the row, S = its sequences, N = its loss tokens (the ones the policy is trained on),
L = tokens of one sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from algorithms.types import Rollout


@dataclass(frozen=True, slots=True)
class PackedRow:
    """The tensors of one micro-batch; entry n of the `_N` arrays is about one loss token."""

    token_ids_T: Tensor
    position_ids_T: Tensor
    lengths_S: tuple[int, ...]
    """Tokens of each sequence, those that it shares included."""
    shared_S: tuple[int, ...]
    """How many of its first tokens are those of the last sequence before it that shares none, and lie there."""
    place_N: Tensor
    """Position of the token in the row."""
    predictor_N: Tensor
    """Position in the row whose logits predict the token: that of the token before it in its sequence."""
    targets_N: Tensor
    sequence_N: Tensor
    """Which of the S sequences the token belongs to."""
    sampled_logprobs_N: Tensor
    advantages_N: Tensor
    reference_logprobs_N: Tensor | None
    fresh_N: Tensor
    """Whether weights no older than the batch's oldest version sampled the token; the others leave the loss."""
    age_N: Tensor
    """Versions between the weights that sampled the token and those that are trained."""

    def to(self, device: torch.device) -> Self:
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value := getattr(self, name), Tensor) else value
            for name in self.__dataclass_fields__
        }
        return type(self)(**moved)


def pack_row(
    rollouts: Sequence[Rollout],
    advantages: Sequence[float | NDArray[np.float32]],
    pad_id: int,
    oldest_version: int = 0,
    version: int = 0,
) -> PackedRow:
    """Lay the rollouts end to end, to be trained at `version`; `advantages` has one number for each, or for each of its
    loss tokens.

    Tokens that weights older than `oldest_version` sampled are not fresh; tokens that nobody sampled are, and of age 0.
    Without rollouts the row is one padding token and no loss token, so that a rank with nothing to do still takes part
    in every collective of the forward and backward pass.
    """
    assert len(rollouts) == len(advantages)
    if not rollouts:
        nothing = np.zeros(1, bool)
        return _row([np.array([pad_id])], [nothing], [np.zeros(1)], [0.0], None, [~nothing], [np.zeros(1, np.int64)])
    assert not any(rollout.loss_mask_T[0] for rollout in rollouts), "a first token has nothing that predicts it"
    references = [rollout.reference_logprobs_T for rollout in rollouts]
    known = [reference for reference in references if reference is not None]
    assert len(known) in (0, len(rollouts)), "either all rollouts have reference log-probabilities or none"
    return _row(
        [rollout.token_ids_T for rollout in rollouts],
        [rollout.loss_mask_T for rollout in rollouts],
        [rollout.logprobs_T for rollout in rollouts],
        advantages,
        known or None,
        [_fresh(rollout, oldest_version) for rollout in rollouts],
        [_ages(rollout, version) for rollout in rollouts],
        _shared(rollouts),
    )


def _shared(rollouts: Sequence[Rollout]) -> list[int]:
    """Of each rollout, the tokens of its prompt when it is that of the rollout before it, else 0."""
    shared: list[int] = []
    before: NDArray[np.int32] | None = None
    for rollout in rollouts:
        prompt = rollout.token_ids_T[: int(np.argmax(rollout.loss_mask_T))]  # empty where nothing is trained
        alike = before is not None and len(prompt) == len(before) and bool(np.array_equal(prompt, before))
        shared.append(len(prompt) if alike else 0)
        before = prompt
    return shared


def _fresh(rollout: Rollout, oldest_version: int) -> np.ndarray:
    fresh_L = np.ones(rollout.num_tokens, bool)
    for span in rollout.spans:
        if span.version < oldest_version:
            fresh_L[span.start : span.stop] = False
    return fresh_L


def _ages(rollout: Rollout, version: int) -> np.ndarray:
    age_L = np.zeros(rollout.num_tokens, np.int64)
    for span in rollout.spans:
        age_L[span.start : span.stop] = max(0, version - span.version)
    return age_L


def _row(
    tokens: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    logprobs: Sequence[np.ndarray],
    advantages: Sequence[float | NDArray[np.float32]],
    references: Sequence[np.ndarray] | None,
    fresh: Sequence[np.ndarray],
    ages: Sequence[np.ndarray],
    shared: Sequence[int] = (0,),
) -> PackedRow:
    lengths = [len(sequence) for sequence in tokens]

    def laid(values: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([of_sequence[start:] for of_sequence, start in zip(values, shared, strict=True)])

    own = np.subtract(lengths, shared)
    loss_positions_N = np.flatnonzero(laid(masks))
    sequence_N = np.repeat(np.arange(len(lengths)), own)[loss_positions_N]
    token_ids_T = torch.from_numpy(laid(tokens).astype(np.int64))

    def pick(values: Sequence[np.ndarray], dtype: Any = np.float32) -> Tensor:
        return torch.from_numpy(laid(values).astype(dtype)[loss_positions_N])

    return PackedRow(
        token_ids_T=token_ids_T,
        position_ids_T=torch.from_numpy(laid([np.arange(length) for length in lengths])),
        lengths_S=tuple(lengths),
        shared_S=tuple(shared),
        place_N=torch.from_numpy(loss_positions_N),
        predictor_N=torch.from_numpy(_before(own, shared)[loss_positions_N]),
        targets_N=token_ids_T[torch.from_numpy(loss_positions_N)],
        sequence_N=torch.from_numpy(sequence_N),
        sampled_logprobs_N=pick(logprobs),
        advantages_N=torch.from_numpy(_of_tokens(advantages, masks)),
        reference_logprobs_N=None if references is None else pick(references),
        fresh_N=pick(fresh, np.bool_),
        age_N=pick(ages, np.int64),
    )


def _before(own: np.ndarray, shared: Sequence[int]) -> np.ndarray:
    """[T]: where in the row the token before each token is; of a first token, somewhere."""
    before_T = np.arange(own.sum()) - 1
    first = 0
    for start, num_shared in zip(np.cumsum(own) - own, shared, strict=True):
        first = first if num_shared else start
        before_T[start] = first + num_shared - 1
    return before_T


def _of_tokens(advantages: Sequence[float | NDArray[np.float32]], masks: Sequence[np.ndarray]) -> np.ndarray:
    """[N]: each sequence's number for all its loss tokens, or one for each."""
    counts = [int(mask.sum()) for mask in masks]
    spread = [np.broadcast_to(np.float32(each), count) for each, count in zip(advantages, counts, strict=True)]
    return np.concatenate(spread)
