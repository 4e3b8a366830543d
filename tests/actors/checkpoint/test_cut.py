"""What a cut holds comes back as it was."""

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest

from actors.checkpoint.best import Score
from actors.checkpoint.cut import Cut, Failures, Measured, Progress
from actors.checkpoint.groups import SavedGroup, decode, encode
from algorithms.bias import SelectionAudit
from algorithms.config import AdaptDepthConfig
from algorithms.depth import DepthController
from algorithms.slots import PacerState, Ready, Slot
from algorithms.types import Group, Prompt, Rollout, ScoredGroup, VersionSpan, summarize


def saved(ordinal: int) -> SavedGroup:
    mask = np.array([False, True, True])
    rollout = Rollout(
        np.array([5, 2**30, 7], np.int32),
        mask,
        np.array([0.0, -0.1, -1e-30], np.float32),
        (VersionSpan(3, 1, 2), VersionSpan(4, 2, 3)),
        "stop",
        np.array([0.0, -0.2, -0.3], np.float32),
    )
    prompt = Prompt(ordinal, 0, (5,), [{"role": "user", "content": "é"}], {"answer": [1, {"x": None}]})
    scored = ScoredGroup(Group(prompt, (rollout, rollout), 1, 9), (1.5, None), {"f": (1.5, None)}, {"timeout": 1})
    return SavedGroup(1, 3, False, summarize(scored, 1.0, 2.0), scored)


def test_a_cut_comes_back(tmp_path: Path) -> None:
    slots = (Slot(4, 0, 3), Slot(5, 2, 3, resumed=True))
    audit, depth = SelectionAudit(), DepthController(AdaptDepthConfig(smoothing=0.9), 2, 8, 6)
    audit.trained([3, 4], [0.1, None])
    audit.left_out("stale", [5], [1 / 3])
    depth.update(math.inf, None)
    cut = Cut(
        7,
        123,
        PacerState(7, 93, 60, slots, (Ready(Slot(6, 1, 3), 3, 4),)),
        Progress(rewards=[0.5]),
        failures=Failures({4: 2}, filtered_in_a_row=3),
        measured=Measured(audit.state(), depth.state()),
        score=Score("reward", 1 / 3, 5),
        num_rows=1000,
    )
    groups = [saved(6), saved(8)]
    cut.write(tmp_path, groups)
    again, groups_again = Cut.read(tmp_path)
    assert again == cut
    for ours, theirs in zip(groups, groups_again, strict=True):
        assert theirs.summary == ours.summary
        for one, other in zip(ours.scored.group.rollouts, theirs.scored.group.rollouts, strict=True):
            for name in ("token_ids_T", "loss_mask_T", "logprobs_T", "reference_logprobs_T"):
                before, after = getattr(one, name), getattr(other, name)
                assert before.dtype == after.dtype
                assert before.tobytes() == after.tobytes()
            assert (one.spans, one.finish_reason) == (other.spans, other.finish_reason)
        assert theirs.scored.group.prompt == ours.scored.group.prompt
        assert theirs.scored.rewards_G == ours.scored.rewards_G


def test_other_bytes_are_refused() -> None:
    for data in (b"", b"\x91\x01", b"\x80", b"\xc1" * 9):
        with pytest.raises(msgspec.MsgspecError):
            decode(data)


def test_a_group_whose_arrays_differ_in_length_is_refused() -> None:
    plain = msgspec.msgpack.decode(encode([saved(6)]))
    plain[0]["scored"]["group"]["rollouts"][0]["logprobs_T"] = bytes(8)
    with pytest.raises(msgspec.MsgspecError, match="have one length"):
        decode(msgspec.msgpack.encode(plain))
