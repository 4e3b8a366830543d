"""Every step is looked at: what is wrong with a run is said, or acted on, before more steps are spent on it."""

from collections.abc import Callable, Mapping
from typing import assert_never

from actors.errors import RollBackError, RunError
from actors.ledger import Ledger
from actors.pacer import AsyncPacer
from actors.policy_group import PolicyGroup
from algorithms.health.config import HealthConfig, Rule
from algorithms.health.rules import Watch


class Health:
    """`after` every step; what it finds wrong is `algorithms/health/rules.py`, what it does about it is here."""

    def __init__(
        self, config: HealthConfig, pacer: AsyncPacer, policy: PolicyGroup, say: Callable[[str], None], ledger: Ledger
    ) -> None:
        """`ledger`: knows how often this run has gone back already, in whatever process."""
        self._config = config
        self._pacer = pacer
        self._policy = policy
        self._say = say
        self._watches = [Watch(rule) for rule in config.rules]
        self._num_skipped_in_a_row = 0
        self._ledger = ledger

    def healthy(self) -> bool:
        """Whether a cut of this moment is one to go back to.

        It is not when a rule that would go back finds something wrong, or begins to; nor when the last step was
        skipped, for weights that give no finite loss may be to blame. The other rules do not hold up cuts: what they
        find may last, and a run without cuts loses all when it is killed.
        """
        if self._num_skipped_in_a_row > 0:
            return False
        return not any(watch.suspicious for watch in self._watches if watch.rule.action == "roll_back")

    async def after(self, version: int, metrics: Mapping[str, float]) -> None:
        """The step that made `version` measured `metrics`; RunError when the run cannot go on like this."""
        skipped = metrics["policy/skipped"] > 0 or metrics.get("value/skipped", 0.0) > 0  # of the critic
        self._count_skipped(version, skipped)
        rested = metrics.get("policy/updates") == 0  # while a critic learns alone
        if skipped or rested:  # what it measured is of weights that have not moved
            return
        found = [(watch.rule, sentence) for watch in self._watches if (sentence := watch.after(metrics)) is not None]
        factor = metrics["policy/learning_rate_factor"]
        for rule, sentence in found:
            factor = await self._act(rule, sentence, factor)

    def _count_skipped(self, version: int, skipped: bool) -> None:
        self._num_skipped_in_a_row = self._num_skipped_in_a_row + 1 if skipped else 0
        if self._num_skipped_in_a_row > self._config.max_skipped_in_a_row:
            raise RunError(
                f"loss or gradient of the last {self._num_skipped_in_a_row} steps, up to version {version}, were not "
                f"finite, more than health.max_skipped_in_a_row allows ({self._config.max_skipped_in_a_row}); the "
                "weights are those of before; lower optimizer.learning_rate, or look for a reward or a logit that is "
                "out of range"
            )

    async def _act(self, rule: Rule, sentence: str, factor: float) -> float:
        """`factor` is what the schedule's learning rate is multiplied by; returns what it is multiplied by then."""
        match rule.action:
            case "warn":
                self._say(f"warning: {sentence}")
            case "pause":
                await self._pacer.stop(f"{sentence} (health.rules: {rule.kind} pauses the run)")
            case "lower_learning_rate":
                return await self._lower_learning_rate(rule, sentence, factor)
            case "roll_back":
                self._roll_back(rule, sentence)
            case _:
                assert_never(rule.action)
        return factor

    async def _lower_learning_rate(self, rule: Rule, sentence: str, factor: float) -> float:
        """The factor says how often it was lowered, in this process or in one before."""
        config = self._config
        lower = factor * config.learning_rate_factor
        if lower < 0.999 * config.learning_rate_factor**config.max_lowerings:
            self._say(
                f"warning: {sentence}; the learning rate was lowered to {factor:g} of its schedule already, as often "
                f"as health.max_lowerings allows ({config.max_lowerings})"
            )
            return factor
        await self._policy.scale_learning_rate(config.learning_rate_factor)
        self._say(
            f"warning: {sentence} (health.rules: {rule.kind} lowers the learning rate to {lower:g} of its schedule)"
        )
        return lower

    def _roll_back(self, rule: Rule, sentence: str) -> None:
        """It counts from now on, also when this process does not live to see the policy built again."""
        allowed, before = self._config.max_roll_backs, self._ledger.num_roll_backs
        if before >= allowed:
            raise RunError(
                f"{sentence}; the run has gone back {before} times already, and health.max_roll_backs allows {allowed}"
            )
        self._ledger.rolled_back(sentence)
        raise RollBackError(
            f"{sentence} (health.rules: {rule.kind} goes back to the last good checkpoint, {before + 1} of "
            f"{allowed} times that health.max_roll_backs allows)"
        )
