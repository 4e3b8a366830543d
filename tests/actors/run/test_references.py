"""Of a run that goes on, the reference's numbers are those of its beginning, or it is said why there are none."""

import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from actors.errors import RunError
from actors.run.references import FILE, References, _key, _Known
from algorithms.types import Rollout


def learned(*mask: bool) -> Rollout:
    """The same tokens always."""
    loss_mask_T = np.array(mask)
    return Rollout(np.arange(len(mask), dtype=np.int32), loss_mask_T, np.zeros(len(mask), np.float32), (), "stop")


async def test_a_sequence_with_another_mask_is_not_known_and_the_causes_are_named(tmp_path: Path) -> None:
    then, now = learned(False, True, True), learned(False, True, False)
    (tmp_path / FILE).write_bytes(msgspec.msgpack.encode(_Known(1, {_key(then): -2.0})))
    nobody: Any = None
    references = References(nobody, tmp_path, 8, print)
    await references.compute(range(1), lambda step: [now], lambda: False)
    assert references.of(then) == -2.0
    causes = "the data have changed, or which tokens of a conversation are learned, as another version of Paceline"
    ways_out = "put the data back, or go on with the version that began the run, or begin anew with --overwrite"
    with pytest.raises(RunError, match=f"{re.escape(FILE)} does not know .*{causes}.*{ways_out}"):
        references.of(now)
