"""Every step is looked at: what is wrong with a run is said, or acted on, before more steps are spent on it."""

from collections.abc import Mapping

from actors.errors import RunError
from algorithms.health.config import HealthConfig


class Health:
    """`after` every step."""

    def __init__(self, config: HealthConfig) -> None:
        self._config = config
        self._num_skipped_in_a_row = 0

    async def after(self, version: int, metrics: Mapping[str, float]) -> None:
        """The step that made `version` measured `metrics`; RunError when the run cannot go on."""
        self._count_skipped(version, metrics["policy/skipped"] > 0)

    def _count_skipped(self, version: int, skipped: bool) -> None:
        self._num_skipped_in_a_row = self._num_skipped_in_a_row + 1 if skipped else 0
        if self._num_skipped_in_a_row > self._config.max_skipped_in_a_row:
            raise RunError(
                f"loss or gradient of the last {self._num_skipped_in_a_row} steps, up to version {version}, were not "
                f"finite, more than health.max_skipped_in_a_row allows ({self._config.max_skipped_in_a_row}); the "
                "weights are those of before; lower optimizer.learning_rate, or look for a reward or a logit that is "
                "out of range"
            )
