"""The summary of a group says of each rollout which weights sampled how many of its tokens."""

from dataclasses import replace

import numpy as np
import pytest

from algorithms.types import Group, Prompt, Rollout, ScoredGroup, VersionSpan, summarize


def rollout(*spans: VersionSpan) -> Rollout:
    return Rollout(np.arange(9, dtype=np.int32), np.arange(9) >= 3, np.zeros(9, np.float32), spans, "stop")


def test_tokens_by_version_of_each_rollout_and_of_the_group() -> None:
    rollouts = (
        rollout(VersionSpan(2, 3, 5), VersionSpan(4, 5, 9)),
        rollout(VersionSpan(3, 3, 3), VersionSpan(4, 3, 9)),  # the empty span sampled nothing
        rollout(),
    )
    group = Group(Prompt(7, 1, (5, 6, 7), "", {}), rollouts, attempt=2, replica=1)
    summary = summarize(ScoredGroup(group, (1.0, None, 0.0), {}), generate_s=1.0, score_s=0.5)
    assert summary.tokens_by_version_G == ({2: 2, 4: 4}, {4: 6}, {})
    assert summary.tokens_by_version == {2: 2, 4: 10}
    assert (summary.oldest_version, summary.newest_version) == (2, 4)


def test_the_kl_of_each_rollout_is_summed_whole_and_to_go() -> None:
    """Tokens of the prompt are not among them, whatever stands there."""
    reference_T = np.array([9.0, 9.0, 9.0, -1.0, 2.0, 0.0, 0.0, 0.0, -3.0], np.float32)
    group = Group(Prompt(7, 1, (5, 6, 7), "", {}), (replace(rollout(), reference_logprobs_T=reference_T),), 0, 0)
    (sums,) = summarize(ScoredGroup(group, (1.0,), {}), 0.0, 0.0).kl_G
    to_go = [2.0, 1.0, 3.0, 3.0, 3.0, 3.0]
    assert (sums.total, sums.to_go) == (to_go[0], sum(to_go))
    assert sums.to_go_squared == pytest.approx(sum(value**2 for value in to_go))
    assert summarize(ScoredGroup(replace(group, rollouts=(rollout(),)), (1.0,), {}), 0.0, 0.0).kl_G == ()
