"""Faults of many classes for two minutes: nothing is lost, done twice, hidden or left behind, and nothing hangs."""

import pytest

from tests.chaos.__main__ import main
from tests.chaos.recipe import CHECKPOINT_EVERY
from tests.prove import PROVING


@pytest.mark.cluster
@pytest.mark.timeout(2400 if PROVING else 900)
def test_faults_cost_time_and_nothing_else() -> None:
    """In `make prove` all of the sixty strike, however long that takes."""
    limit = [] if PROVING else ["--seconds", "120"]
    counts = main(["--faults", "60", "--seed", "0", "--restarts", "0.14", *limit])
    assert counts.pop("faults") >= (60 if PROVING else 5)
    assert counts.pop("classes") >= (15 if PROVING else 5)
    assert counts.pop("recovery_steps_max") < 3 * CHECKPOINT_EVERY, "one that is being written, and one that is damaged"
    assert not any(counts.values()), counts
