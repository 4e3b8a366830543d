"""A packed row holds each loss token with its own values, knows which tokens are too old, and no prompt twice."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from algorithms.packed import pack_row
from algorithms.types import Rollout, VersionSpan


def rollout(num_prompt: int, spans: Sequence[tuple[int, int]], num_unlabelled: int = 0) -> Rollout:
    """`spans` are (version, number of tokens), one after another."""
    labelled, at = [], num_prompt
    for version, num_tokens in spans:
        labelled.append(VersionSpan(version, at, at + num_tokens))
        at += num_tokens
    total = at + num_unlabelled
    return Rollout(
        token_ids_T=np.arange(total, dtype=np.int32) + 10 * num_prompt,
        loss_mask_T=np.arange(total) >= num_prompt,
        logprobs_T=-np.arange(total, dtype=np.float32),
        spans=tuple(labelled),
        finish_reason="stop",
    )


ROLLOUTS = [rollout(2, [(3, 1), (5, 2)]), rollout(1, [(4, 2)]), rollout(3, [(4, 1), (6, 1), (7, 1)])]


@pytest.mark.parametrize(
    ("oldest_version", "fresh"),
    [
        (0, [True] * 8),
        (3, [True] * 8),
        (4, [False] + [True] * 7),
        (5, [False, True, True, False, False, False, True, True]),
        (8, [False] * 8),
    ],
)
def test_tokens_of_older_weights_are_not_fresh(oldest_version: int, fresh: list[bool]) -> None:
    row = pack_row(ROLLOUTS, [1.0, 2.0, 3.0], pad_id=0, oldest_version=oldest_version)
    assert row.fresh_N.dtype == torch.bool
    assert row.fresh_N.tolist() == fresh


def test_tokens_that_nobody_sampled_are_fresh() -> None:
    row = pack_row([rollout(2, [(1, 1)], num_unlabelled=2), rollout(2, [], num_unlabelled=2)], [0.0, 0.0], 0, 5)
    assert row.fresh_N.tolist() == [False, True, True, True, True]


def test_the_age_of_a_token_is_how_many_versions_ago_it_was_sampled() -> None:
    row = pack_row(ROLLOUTS, [1.0, 2.0, 3.0], pad_id=0, version=7)
    assert row.age_N.tolist() == [4, 2, 2, 3, 3, 3, 1, 0]
    assert pack_row([rollout(2, [], num_unlabelled=2)], [0.0], 0, version=7).age_N.tolist() == [0, 0]


def test_the_values_of_each_loss_token() -> None:
    row = pack_row(ROLLOUTS, [1.0, 2.0, 3.0], pad_id=0)
    assert row.lengths_S == (5, 3, 6)
    assert row.position_ids_T.tolist() == [*range(5), *range(3), *range(6)]
    assert row.sequence_N.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert row.advantages_N.tolist() == [1.0] * 3 + [2.0] * 2 + [3.0] * 3
    assert row.sampled_logprobs_N.tolist() == [-2.0, -3.0, -4.0, -1.0, -2.0, -3.0, -4.0, -5.0]
    assert row.targets_N.tolist() == [22, 23, 24, 11, 12, 33, 34, 35]
    assert row.token_ids_T[row.predictor_N].tolist() == [21, 22, 23, 10, 11, 32, 33, 34]


def test_a_rollout_may_have_an_advantage_for_each_loss_token() -> None:
    row = pack_row(ROLLOUTS, [np.array([1.0, -2.0, 3.5], np.float32), 2.0, np.zeros(3, np.float32)], pad_id=0)
    assert row.advantages_N.dtype == torch.float32
    assert row.advantages_N.tolist() == [1.0, -2.0, 3.5, 2.0, 2.0, 0.0, 0.0, 0.0]


def test_a_row_without_rollouts_has_no_loss_token() -> None:
    row = pack_row([], [], pad_id=7)
    assert row.token_ids_T.tolist() == [7]
    assert len(row.targets_N) == len(row.fresh_N) == len(row.age_N) == 0


def test_neighbours_with_the_same_prompt_share_it() -> None:
    """Three of one group and one of another; the answers are told apart by their last tokens."""
    made = []
    for prompt, completion in (([5, 6, 7], [1, 2]), ([5, 6, 7], [3]), ([5, 6, 7], [4, 2, 1]), ([5, 6, 8], [9])):
        total = len(prompt) + len(completion)
        mask_T = np.arange(total) >= len(prompt)
        logprobs_T = np.where(mask_T, -np.arange(total), 0).astype(np.float32)
        made.append(Rollout(np.array(prompt + completion, np.int32), mask_T, logprobs_T, (), "stop"))
    row = pack_row(made, [1.0, 2.0, 3.0, 4.0], pad_id=0)
    assert row.token_ids_T.tolist() == [5, 6, 7, 1, 2, 3, 4, 2, 1, 5, 6, 8, 9]
    assert row.position_ids_T.tolist() == [0, 1, 2, 3, 4, 3, 3, 4, 5, 0, 1, 2, 3]
    assert (row.lengths_S, row.shared_S) == ((5, 4, 6, 4), (0, 3, 3, 0))
    assert row.place_N.tolist() == [3, 4, 5, 6, 7, 8, 12]
    assert row.predictor_N.tolist() == [2, 3, 2, 2, 6, 7, 11]
    assert row.targets_N.tolist() == [1, 2, 3, 4, 2, 1, 9]
    assert row.sequence_N.tolist() == [0, 0, 1, 2, 2, 2, 3]
    assert row.advantages_N.tolist() == [1.0, 1.0, 2.0, 3.0, 3.0, 3.0, 4.0]
    assert row.sampled_logprobs_N.tolist() == [-3.0, -4.0, -3.0, -3.0, -4.0, -5.0, -3.0]


def test_nothing_is_shared_where_nothing_is_trained() -> None:
    nothing = rollout(3, [])
    row = pack_row([nothing, nothing, rollout(3, [(1, 1)])], [0.0] * 3, pad_id=0)
    assert row.shared_S == (0, 0, 0)
    assert len(row.token_ids_T) == 10
