"""Faults where replicas lie with the policy: nothing is lost, nobody samples while it steps, nobody is left asleep."""

import pytest

from tests.chaos.__main__ import main
from tests.chaos.recipe import CHECKPOINT_EVERY
from tests.prove import ONLY_PROVE


@ONLY_PROVE
@pytest.mark.cluster
@pytest.mark.timeout(900)
@pytest.mark.parametrize("only", ["replica", "policy"])
def test_faults_on_shared_gpus_cost_time_and_nothing_else(only: str) -> None:
    """Light engines, which report a token that is sampled while the policy steps, or by weights that are not there."""
    counts = main(["--faults", "16", "--seed", "0", "--restarts", "0", "--colocated", "--only", only])
    assert counts.pop("faults") == 16
    assert counts.pop("classes") >= 8
    assert counts.pop("recovery_steps_max") < 3 * CHECKPOINT_EVERY
    assert not any(counts.values()), counts
