"""A fleet of actors that a test has made itself."""

from collections.abc import Sequence
from typing import Any

from actors.fleet import Fleet
from actors.router import Router


def fleet_of(handles: Sequence[Any]) -> Fleet:
    """Replica n is `handles[n]`; none is rebuilt."""
    router = Router(max_groups_per_replica=64, num_generations=4, max_completion_length=160)
    return Fleet(
        lambda number, bundle: handles[number], len(handles), router, start_timeout_s=300.0, max_rebuilds=0, say=print
    )
