"""Every slot-second of the run is in exactly one place: trained, masked, wasted, unfinished or idle."""

from collections.abc import Mapping
from dataclasses import dataclass

from algorithms.simulation.config import SimulationConfig
from algorithms.simulation.setup import Setup


@dataclass(frozen=True, slots=True)
class Amount:
    """What was sampled, and how long slots were occupied for it; pauses do not count."""

    tokens: int = 0
    slot_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """Lengths of completions: the exact mean, and some of them, evenly spaced in the order of the run."""

    count: int
    mean: float
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did, from the end of the one before it to the commit of its version."""

    time_s: float
    """When the version was committed."""
    busy_share: float
    """Share of the slots that decoded."""
    training_share: float
    """Share of the time that the policy trained."""


@dataclass(frozen=True, slots=True)
class Bound:
    """Groups per second that no schedule exceeds: N / E[D] with all slots decoding, B / T with the policy training, or
    the critic."""

    rollout: float
    policy: float
    takes_turns: bool = False
    """They have the same GPUs, one after the other."""

    @property
    def groups_per_s(self) -> float:
        if self.takes_turns:
            return 1.0 / (1.0 / self.rollout + 1.0 / self.policy)
        return min(self.rollout, self.policy)


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """What the run would have done."""

    steps: int
    time_s: float
    num_slots: int
    groups_per_batch: int
    bound: Bound

    num_dispatched: int
    """Ordinals; each is trained, left out or unfinished."""
    num_trained: int
    num_left_out: Mapping[str, int]
    """Ordinals that left the run untrained, by cause: stale, surplus, filtered."""
    num_unfinished: int
    """Ordinals that were dispatched and have no fate when the last step ends."""
    num_redispatched: int
    """Attempts after the first."""
    num_failures: int

    trained: Amount
    masked: Amount
    """Of groups that were trained: tokens beyond the bound, which left the loss."""
    wasted: Mapping[str, Amount]
    """By cause: requeued, stale, surplus, failed, filtered."""
    unfinished: Amount

    staleness: tuple[float, ...]
    """Share of the trained tokens by age, in versions."""
    max_staleness: int
    """The highest age of a trained token."""
    policy_s: Mapping[str, float]
    """Seconds of the policy: training, publishing, and waiting for groups, for the oldest, or for the critic."""
    slot_idle_s: Mapping[str, float]
    """Seconds of idle slots by reason: depth, capacity, bound, done, publishing, failed."""

    lengths_dispatched: Sample
    """Of every first attempt: what the model says."""
    lengths_trained: Sample
    """What it is trained on; a lower mean than of the dispatched ones is a bias."""
    lengths_left_out: Sample
    """Of attempts that were thrown away, failures apart: their full lengths, also where they were cut off."""
    timeline: tuple[StepRecord, ...]

    @property
    def step_time_s(self) -> float:
        return self.time_s / self.steps

    @property
    def groups_per_s(self) -> float:
        return self.num_trained / self.time_s

    @property
    def share_of_bound(self) -> float:
        return self.groups_per_s / self.bound.groups_per_s

    @property
    def efficiency(self) -> float:
        """Slot-seconds whose tokens were trained, of all."""
        return self.trained.slot_s / (self.num_slots * self.time_s)

    @property
    def mean_staleness(self) -> float:
        return sum(age * share for age, share in enumerate(self.staleness))


def bound(config: SimulationConfig, setup: Setup, mean_length: float) -> Bound:
    """The two bounds for completions of this mean length; publishing and filtering cost no time in the second."""
    iteration_s = config.decode.base_s + config.decode.per_sequence_s * setup.max_num_seqs
    group_slot_s = setup.num_generations * mean_length * iteration_s
    tokens = setup.groups_per_batch * setup.num_generations * (config.prompt_length + mean_length)
    values_s, critic_s = critic_seconds(config, setup, tokens)
    step_s = values_s + max(train_s(config, setup, tokens), critic_s)
    return Bound(
        rollout=setup.num_slots / group_slot_s * (1.0 - config.filtered_share),
        policy=setup.groups_per_batch / step_s if step_s else float("inf"),
        takes_turns=setup.takes_turns,
    )


def train_s(config: SimulationConfig, setup: Setup, num_tokens: float) -> float:
    """Seconds of a training step on so many tokens."""
    return config.train.per_step_s + config.train.per_token_s * num_tokens / setup.num_policy_workers


def critic_seconds(config: SimulationConfig, setup: Setup, num_tokens: float) -> tuple[float, float]:
    """Seconds in which the critic values so many tokens, and in which it then learns from them; 0 without one."""
    if not setup.num_critic_workers:
        return 0.0, 0.0
    share = num_tokens / setup.num_critic_workers
    values, train = config.critic.values, config.critic.train
    return values.per_step_s + values.per_token_s * share, train.per_step_s + train.per_token_s * share
