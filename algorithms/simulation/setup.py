"""The numbers of a recipe that a simulation needs; whoever reads recipes makes one."""

from dataclasses import dataclass

from algorithms.pacing import WhenStale


@dataclass(frozen=True, slots=True)
class Setup:
    """What is scheduled, on how many workers, under which bound."""

    steps: int
    groups_per_batch: int
    num_generations: int
    max_completion_length: int
    num_replicas: int
    max_num_seqs: int
    """Sequences that one replica decodes at once: its slots."""
    max_groups_per_replica: int
    num_policy_workers: int = 1
    num_critic_workers: int = 0
    max_staleness: int = 1
    when_stale: WhenStale = "pace"
    over_sampling: float = 1.0
    pipeline_depth: int | None = None
    in_flight_updates: bool = True
    takes_turns: bool = False
    """The replicas stand still while the policy trains, until they have its version; for in-flight updates alone."""

    @property
    def num_slots(self) -> int:
        return self.num_replicas * self.max_num_seqs

    @property
    def max_in_flight(self) -> int:
        """Groups that all replicas together may hold."""
        return self.num_replicas * self.max_groups_per_replica
