"""A real replica whose engine can be told to fail in the publication of a version."""

from typing import Any

from actors.rollout import RolloutActor
from sync.receiver import WeightReceiver
from tests.actors.light import Fault, FaultyWire


class FaultyReceiver(WeightReceiver):
    """Strikes in vLLM's worker, which is the engine's process: the actor lives on and must notice."""

    fault: Fault | None = None
    coming: int | None = None

    def plan_fault(self, kind: Any, at: Any, version: int) -> None:
        self.fault = Fault(kind, at, version)

    def begin_receive(self, version: int) -> None:
        self.coming = version
        self._strike("announce")
        group: Any = self.staging._group
        if self.fault is not None and self.fault.version == version:
            self.staging._group = wire = FaultyWire(group)  # type: ignore[assignment]
            wire.fault = self.fault
        super().begin_receive(version)

    def verify(self, version: int, digests: list[str]) -> None:
        self._strike("verify")
        super().verify(version, digests)

    def swap(self) -> None:
        self._strike("swap")
        super().swap()

    def _strike(self, phase: str) -> None:
        if self.fault is not None and self.fault.at == phase and self.fault.version == self.coming:
            self.fault.strike()


class FaultyRolloutActor(RolloutActor):
    """Told once its engine has started."""

    worker_extension = "tests.actors.faulty.FaultyReceiver"

    async def plan_fault(self, fault: Fault) -> None:
        await self.engine.collective_rpc("plan_fault", args=(fault.kind, fault.at, fault.version))
