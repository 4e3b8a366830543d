"""How much of the user's own code may fail before a run is not worth going on with."""

from collections import Counter, deque
from collections.abc import Mapping, Sequence

WINDOW = 100
"""Groups that are looked back on."""


class RewardBudget:
    """Says when the reward calls of more than `max_failed_share` of the last 100 groups have failed.

    The share is of 100 groups from the beginning on, so that what fails always is told after a share of 100 groups and
    one, and what fails now and then is not told for having failed early.
    """

    def __init__(self, max_failed_share: float) -> None:
        self._max_failed_share = max_failed_share
        self._window: deque[Mapping[str, int]] = deque(maxlen=WINDOW)
        self._last = ""

    def spent(self, failures: Mapping[str, int], details: Sequence[str]) -> str | None:
        """Another group's failed calls by cause, and what each said; the sentence that ends the run, or None."""
        self._window.append(failures)
        self._last = details[-1] if details else self._last
        num_failed = sum(1 for of_group in self._window if of_group)
        if num_failed <= self._max_failed_share * WINDOW:
            return None
        causes: Counter[str] = Counter()
        for of_group in self._window:
            causes.update(of_group)
        counts = ", ".join(f"{cause} {count}" for cause, count in causes.most_common())
        return (
            f"rewards failed in {num_failed} of the last {len(self._window)} groups ({counts}), more than "
            f"rewards.max_failed_share allows ({self._max_failed_share:g} of {WINDOW}); the last was {self._last}; "
            "mend the function, or raise the share to train without those rewards"
        )
