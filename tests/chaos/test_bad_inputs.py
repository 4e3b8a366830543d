"""300 inputs that are wrong by construction are refused in words; `make chaos` tries more than 10,000."""

from pathlib import Path

import pytest

from tests.chaos.bad_inputs import try_all


@pytest.mark.campaign
def test_bad_inputs_are_refused_by_name(tmp_path: Path) -> None:
    verdicts = try_all(300, seed=0, folder=tmp_path)
    assert verdicts.inputs == verdicts.distinct == 300
    assert len(verdicts.kinds) >= 12
    assert (verdicts.tracebacks, verdicts.silent_accepts, verdicts.unclear) == (0, 0, 0), verdicts.notes[:10]
