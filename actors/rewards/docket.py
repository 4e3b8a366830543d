"""Which visit is begun next; nobody answers for the failure of another, and nobody is begun more than three times.

A child that ends takes all visits with it that were in flight. When there was one it is named. When there were several
nobody knows whose fault it was, so each is a suspect and is begun again alone, until one ends its child alone: it is
named, and those that were suspected for the same end are cleared. One that was in two ended children is not cleared
again. So every begin that is in vain names somebody, or is the last but one of somebody.
"""

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

_MOST_LOST = 2
"""Children that may end under a visit before it is begun alone, whatever is known of the others."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one call of one function gave: a score or None per completion, and why scores are missing."""

    scores: tuple[float | None, ...]
    cause: str | None = None
    """None, `timeout`, `exception`, `memory`, `died` or `bad_output`."""
    detail: str = ""


@dataclass(eq=False, slots=True)
class Visit:
    """One group at one child: the functions that are called for it, step after step."""

    steps: tuple[tuple[int, ...], ...]
    """By the places of the functions in the child; those of one step are called together."""
    arguments: str
    """As JSON."""
    num_completions: int
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    """Of the functions that were called so far."""
    answer: Future[dict[int, Outcome]] = field(default_factory=Future)
    num_lost: int = 0
    """Children that ended while it was in flight, and nobody knows that it was its fault."""
    had_company: bool = False
    """Another was in flight at some time since it was begun."""

    @property
    def step(self) -> tuple[int, ...]:
        """The functions that are to be called now; none when all have been."""
        return next((step for step in self.steps if step[0] not in self.outcomes), ())


class Docket:
    """The visits of one child."""

    def __init__(self, width: int) -> None:
        self.width = width
        """Visits that may be in flight at one time."""
        self.in_flight: list[Visit] = []
        self._waiting: deque[Visit] = deque()
        self._suspects: deque[Visit] = deque()
        self._alone: Visit | None = None
        self._was_held = False
        """A deadline passed while somebody held the process, and who it was has not been found out."""
        self._any_in_time = False
        """And alone one of its suspects was in time."""

    def add(self, visit: Visit) -> None:
        self._waiting.append(visit)

    def everyone(self) -> list[Visit]:
        """All that have not got their answer."""
        return [*self.in_flight, *self._suspects, *self._waiting]

    def next(self) -> Visit | None:
        """One that is to be begun now; it is in flight from here on."""
        if self._suspects:
            if self.in_flight:
                return None
            visit = self._alone = self._suspects.popleft()
        elif self._waiting and self._alone is None and len(self.in_flight) < self.width:
            visit = self._waiting.popleft()
        else:
            return None
        visit.had_company = bool(self.in_flight)
        for other in self.in_flight:
            other.had_company = True
        self.in_flight.append(visit)
        return visit

    def is_alone(self, visit: Visit) -> bool:
        """Nobody else was in flight since it was begun. (A task that a call before it has left in the loop could still
        be to blame for what becomes of it; whose that is nobody knows.)"""
        return not visit.had_company

    def done(self, visit: Visit, in_time: bool = True) -> None:
        """It has left, and its child lives."""
        self.in_flight.remove(visit)
        if visit is self._alone:
            self._any_in_time = self._any_in_time or in_time
            self._tried()

    def again(self, visit: Visit) -> None:
        """It has a further step, and lost its child: it is begun before all others."""
        self._waiting.appendleft(visit)

    def cut_off(self, visit: Visit) -> None:
        """Its deadline passed while others held the process: whether it would have been in time, it shows alone."""
        self.in_flight.remove(visit)
        self._suspected([visit])
        self._was_held = True

    def ended(self, held: bool) -> Visit | None:
        """The child has ended, because somebody held it or otherwise: whose fault that is, when it is clear.

        None is in flight any more; one that is named has left.
        """
        lost, self.in_flight = self.in_flight, []
        if len(lost) > 1:
            self._suspected(lost)
            self._was_held = self._was_held or held
            return None
        if lost and lost[0] is self._alone:
            cleared = [visit for visit in self._suspects if visit.num_lost < _MOST_LOST]
            self._suspects = deque(visit for visit in self._suspects if visit.num_lost >= _MOST_LOST)
            self._waiting.extendleft(reversed(cleared))
            self._was_held = False
            self._tried()
        return lost[0] if lost else None

    def ended_by(self, culprit: Visit) -> None:
        """The child was ended because of one; the others in flight are begun again."""
        innocent = [visit for visit in self.in_flight if visit is not culprit]
        self.in_flight = []
        if culprit is self._alone:
            self._tried()
        for visit in innocent:
            visit.num_lost += 1
        self._suspects.extend(visit for visit in innocent if visit.num_lost >= _MOST_LOST)
        self._waiting.extendleft(reversed([visit for visit in innocent if visit.num_lost < _MOST_LOST]))

    def _suspected(self, visits: list[Visit]) -> None:
        for visit in visits:
            visit.num_lost += 1
        self._suspects.extend(visits)

    def _tried(self) -> None:
        """The one that was alone has left; when it was the last, and nobody was found to hold the process, all did.

        Then fewer are begun together from here on.
        """
        self._alone = None
        if self._suspects:
            return
        if self._was_held and self._any_in_time:
            self.width = max(1, self.width // 2)
        self._was_held = self._any_in_time = False
