"""A rule finds something wrong once per episode, on a whole window of steps of this process; nothing is random."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from algorithms.health.config import EntropyRule, IdleRule, KlRule, LengthRule, OffPolicyRule, Rule, ZeroStdRule

Metrics = Mapping[str, float]
Point = tuple[float, float]
"""What a rule keeps of a step: its metric, and the reward or the time that it is held against."""


@dataclass(slots=True)
class Watch:
    """One rule over the steps of a run; a run that goes on begins with an empty window."""

    rule: Rule
    firing: bool = False
    """An episode lasts from the step at which the rule finds something to the first at which it does not."""
    _points: deque[Point] = field(init=False)

    def __post_init__(self) -> None:
        self._points = deque(maxlen=self.rule.window)

    @property
    def suspicious(self) -> bool:
        """The rule has found something, or would if the last step were the whole window."""
        return self.firing or (len(self._points) > 0 and finding(self.rule, [self._points[-1]]) is not None)

    def after(self, metrics: Metrics) -> str | None:
        """One more step; what is wrong, when an episode begins.

        An episode that the learning rate was lowered for is told again when a window later it still lasts.
        """
        point = measured(self.rule, metrics)
        if point is None:
            return None
        self._points.append(point)
        if len(self._points) < self.rule.window:
            return None
        found = finding(self.rule, self._points)
        began = found is not None and not self.firing
        again = found is not None and self.rule.action == "lower_learning_rate"
        # After an episode, as after a remedy, it takes a whole new window to find something: none flickers.
        if again or (self.firing and found is None):
            self._points.clear()
        self.firing = found is not None
        return found if began or again else None


def measured(rule: Rule, metrics: Metrics) -> Point | None:
    """What the rule keeps of a step; None when the step has not measured it."""
    match rule:
        case ZeroStdRule():
            return _single(metrics.get("frac_reward_zero_std"))
        case OffPolicyRule():
            # A sample size that is no finite number is not among the metrics, and the worst there is.
            return _single(metrics.get("sampling/ess", 0.0))
        case KlRule():
            return _single(metrics.get("kl"))
        case EntropyRule():
            return _single(metrics.get("entropy"))
        case LengthRule():
            length, reward = metrics.get("completions/mean_length"), metrics.get("reward")
            return None if length is None or reward is None else (length, reward)
        case IdleRule():
            waited = sum(seconds for name, seconds in metrics.items() if name.startswith(f"wait/{rule.pool}/"))
            return waited, metrics["step_time"]


def finding(rule: Rule, points: Sequence[Point]) -> str | None:
    """What is wrong with these steps, and what to try; None when nothing is."""
    over = f"over the last {len(points)} steps"
    mean = _mean([first for first, _ in points])
    match rule:
        case ZeroStdRule() if mean > rule.max_share:
            return (
                f"frac_reward_zero_std was {mean:.2f} {over}, above {rule.max_share:g}: the rewards of nearly every "
                "group are all equal, and nothing is learned from it; use prompts that are neither too easy nor too "
                "hard, a reward that tells completions apart, or algorithm.dynamic_sampling"
            )
        case OffPolicyRule() if mean < rule.min_ess:
            return (
                f"sampling/ess was {mean:.3g} {over}, under {rule.min_ess:g}: the samples are far from what the "
                "policy would say now; lower optimizer.learning_rate, staleness.max_staleness or "
                "staleness.pipeline_depth"
            )
        case KlRule() if mean > rule.max:
            return (
                f"kl was {mean:.3g} nats a token {over}, above {rule.max:g}: the policy has left the reference far "
                "behind; lower optimizer.learning_rate, or raise algorithm.beta"
            )
        case EntropyRule() if mean < rule.min:
            return (
                f"entropy was {mean:.2g} nats a token {over}, under {rule.min:g}: the policy always says the same; "
                "lower optimizer.learning_rate, raise generation.temperature or algorithm.epsilon_high, or look for a "
                "reward that can be had without solving the task"
            )
        case LengthRule():
            return _lengthening(rule, points)
        case IdleRule():
            return _idling(rule, points)
    return None


def _lengthening(rule: LengthRule, points: Sequence[Point]) -> str | None:
    middle = len(points) // 2
    if middle == 0:
        return None
    (short, low), (long, high) = (
        (_mean([length for length, _ in half]), _mean([reward for _, reward in half]))
        for half in (list(islice(points, middle)), list(islice(points, middle, None)))
    )
    if long <= rule.max_growth * short or high - low > rule.min_gain:
        return None
    return (
        f"completions/mean_length grew from {short:.0f} to {long:.0f} over the last {len(points)} steps while reward "
        f"went from {low:.3g} to {high:.3g}: length is not what is rewarded; set algorithm.loss_type to 'dr_grpo', "
        "algorithm.mask_truncated_completions, or a reward that counts length"
    )


def _idling(rule: IdleRule, points: Sequence[Point]) -> str | None:
    share = sum(waited for waited, _ in points) / sum(step_s for _, step_s in points)
    if share <= rule.max_share:
        return None
    advice = {
        "policy": "give the rollout pool more workers, or the policy pool fewer",
        "rollout": "give the policy pool more workers, raise staleness.pipeline_depth or staleness.max_staleness",
    }[rule.pool]
    return (
        f"wait/{rule.pool} was {min(1.0, share):.0%} of the time of the last {len(points)} steps, above "
        f"{rule.max_share:.0%}: the pool has next to nothing to do; {advice} (python -m deploy simulate weighs them)"
    )


def _single(value: float | None) -> Point | None:
    return None if value is None else (value, 0.0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
