"""The summary of a group says of each rollout which weights sampled how many of its tokens."""

import numpy as np

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
