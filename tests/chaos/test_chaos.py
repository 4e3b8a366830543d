"""Sixty faults of many classes: nothing is lost, done twice, hidden or left behind, and nothing hangs."""

import pytest

from tests.chaos.__main__ import main
from tests.chaos.recipe import CHECKPOINT_EVERY


@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_faults_cost_time_and_nothing_else() -> None:
    counts = main(["--faults", "60", "--seed", "0", "--restarts", "0.12"])
    assert counts.pop("faults") == 60
    assert counts.pop("classes") >= 15
    assert counts.pop("recovery_steps_max") < 3 * CHECKPOINT_EVERY, "one that is being written, and one that is damaged"
    assert not any(counts.values()), counts
