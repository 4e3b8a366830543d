"""A run's name is its id on the cluster, each submission is an attempt, and at most one attempt is under way.

Ray takes an id once, and deleting a job to use its id again is not supported. So the first attempt of `my-run` is the
job `my-run`, the next `my-run.2`: a run's name has no dot. Two who submit at once want the same id, and Ray gives it to
one of them.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,45}[a-z0-9])?")
"""A run's name, as recipes take it."""
_ID = re.compile(rf"(?P<run>{NAME.pattern})(\.(?P<number>[1-9]\d*))?")
_KILLED = 128
STOPPED = 75


@dataclass(frozen=True, slots=True)
class Attempt:
    """One job of a run, as the cluster tells it."""

    run: str
    number: int
    state: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    command: str = ""
    ours: bool = True
    """Whether `submit` made it."""
    run_dir: str | None = None
    stop_wait_s: float = 3.0
    """How long Ray lets it take to stop."""
    began_s: float | None = None
    ended_s: float | None = None
    driver_exit_code: int | None = None
    message: str = ""

    @property
    def job(self) -> str:
        return job_id(self.run, self.number)

    @property
    def under_way(self) -> bool:
        return self.state in ("PENDING", "RUNNING")

    @property
    def exit_code(self) -> int | None:
        """The run's own where it is known; 75 where it was stopped; None while it is under way."""
        match self.state:
            case "PENDING" | "RUNNING":
                return None
            case "SUCCEEDED":
                return 0
            case "STOPPED":
                return STOPPED
        code = self.driver_exit_code
        if code is None or code == 0:
            return 1  # Ray could not start it, or lost it
        return _KILLED - code if code < 0 else code


def check_name(name: str) -> str:
    """The name of a run, or a ValueError."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is no name of a run, which is the recipe's `name`: lower-case letters, digits and dashes, 47 at "
            "most"
        )
    return name


def job_id(run: str, number: int) -> str:
    """The id under which the cluster has an attempt."""
    return run if number == 1 else f"{run}.{number}"


def parse_id(job: str) -> tuple[str, int] | None:
    """The run and the number of the attempt; None for an id that no run has."""
    found = _ID.fullmatch(job)
    if found is None or found["number"] == "1":
        return None
    return found["run"], int(found["number"] or 1)


def of_run(run: str, attempts: Iterable[Attempt]) -> list[Attempt]:
    """The attempts of one run, the oldest first."""
    return sorted((each for each in attempts if each.run == run), key=lambda each: each.number)


def next_number(mine: Iterable[Attempt]) -> int:
    """Of the attempt that comes after these, whatever has been deleted between."""
    return max((each.number for each in mine), default=0) + 1
