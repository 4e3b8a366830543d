"""All that a run knows between two steps besides the policy, of one moment: into a cut, and back."""

from collections.abc import Callable
from dataclasses import dataclass

from actors.attempts import Attempts
from actors.checkpoint.cut import Cut, Measured, Progress
from actors.ledger import Ledger
from actors.pacer import AsyncPacer, ReadyGroup
from algorithms.depth import DepthController


@dataclass(frozen=True, slots=True)
class GrpoMoment:
    """Of a GRPO run; the pacer, which must know before anybody waits, is restored by itself."""

    pacer: AsyncPacer
    ledger: Ledger
    attempts: Attempts
    depth: DepthController | None
    progress: Callable[[], Progress]
    num_rows: int | None = None
    """Of the data set."""

    def take(self, version: int) -> tuple[Cut, list[ReadyGroup]]:
        """The cut and its scored groups; nothing is awaited here."""
        state, ready = self.pacer.state()
        cut = Cut(
            version,
            self.ledger.num_lines,
            state,
            self.progress(),
            failures=self.attempts.state(),
            measured=Measured(self.ledger.audit.state(), None if self.depth is None else self.depth.state()),
            num_rows=self.num_rows,
        )
        self.ledger.flush()
        return cut, ready

    async def restore(self, cut: Cut) -> None:
        """Go on as the run did when the cut was taken."""
        self.attempts.restore(cut.failures)
        if cut.measured.audit is not None:
            self.ledger.audit.restore(cut.measured.audit)
        if self.depth is not None and cut.measured.depth is not None:
            self.depth.restore(cut.measured.depth)
            await self.pacer.set_depth(self.depth.depth)
