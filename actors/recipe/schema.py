"""A recipe is the whole configuration of one run: frozen, closed, and checked before anything is started.

`load_recipe` reads one YAML file and `dotted.key=value` overrides (see file.py for how keys are checked).
"""

from typing import Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from actors.recipe.base import BaseRecipe, OfflineRecipe, check_teams
from actors.recipe.critic import CriticConfig
from actors.recipe.methods import is_about, method_refusals
from actors.recipe.model import PretrainedModel, ReferenceConfig
from actors.recipe.preference import KtoRecipe, PairRecipe
from actors.recipe.rewards import RewardsConfig
from actors.recipe.rollout import GenerationConfig, RolloutConfig
from actors.recipe.upkeep import LivenessConfig, StallConfig
from algorithms.config import STORED, GrpoConfig, StalenessConfig
from algorithms.gkd import DistillationConfig
from algorithms.health.config import HealthConfig
from algorithms.pacing import default_depth
from algorithms.preference.config import OnlineDpoConfig
from algorithms.simulation.config import SimulationConfig
from sync.config import SyncConfig


class GrpoRecipe(BaseRecipe):
    """Asynchronous GRPO: rollouts on one pool, the policy on another, at most `max_staleness` versions apart."""

    kind: Literal["grpo"]
    groups_per_batch: int = Field(ge=1)
    """Prompt groups that one update trains on."""
    algorithm: GrpoConfig = GrpoConfig()
    reference: ReferenceConfig | None = None
    """The model that the KL penalty is measured against, with the policy's tokenizer; null takes the policy's initial
    weights, which with `policy.lora` are those below the adapter, so that no worker is needed for them. With
    `algorithm.kl_penalty: advantage` it is a teacher."""
    critic: CriticConfig | None = None
    """For algorithm.advantage 'gae' alone; null takes the critic's defaults."""
    distillation: DistillationConfig | None = None
    """Learn from the whole distributions of a teacher, which `reference` names and each policy rank loads, in place of
    GRPO's loss; rewards are only measured."""
    online_dpo: OnlineDpoConfig | None = None
    """Learn from the best and the worst of each group by DPO's loss, in place of GRPO's."""
    staleness: StalenessConfig = StalenessConfig()
    rewards: RewardsConfig
    generation: GenerationConfig = GenerationConfig()
    rollout: RolloutConfig = RolloutConfig()
    sync: SyncConfig = SyncConfig()
    health: HealthConfig = HealthConfig()
    liveness: LivenessConfig = LivenessConfig()
    stall: StallConfig = StallConfig()
    simulation: SimulationConfig = SimulationConfig()
    """How long things take, for `python -m deploy simulate`; training ignores it."""

    @model_validator(mode="after")
    def _sound(self, info: ValidationInfo) -> Self:
        staleness, algorithm = self.staleness, self.algorithm
        if staleness.max_staleness > 0 and not algorithm.corrects_off_policy:
            raise ValueError(
                f"staleness.max_staleness: {staleness.max_staleness} trains on stale samples without an off-policy "
                "correction; set algorithm.vllm_importance_sampling_correction to true, algorithm.old_logprobs to "
                "'sampled', or staleness.max_staleness to 0"
            )
        stored = info.context == STORED
        for refusal in method_refusals(self) if not stored else ():
            raise ValueError(refusal)
        if self.reference is not None and algorithm.beta == 0 and self.distillation is None:
            raise ValueError(
                "reference: nothing is measured against it when algorithm.beta is 0; set algorithm.beta, or leave "
                "reference out"
            )
        cache, longest = algorithm.soft_punish_cache, self.generation.max_completion_length
        if cache is not None and cache > longest:
            raise ValueError(
                f"algorithm.soft_punish_cache: {cache} tokens before a limit of {longest} begin before the completion "
                f"does; set it to {longest} or less, or raise generation.max_completion_length"
            )
        rolls_back = any(rule.action == "roll_back" for rule in self.health.rules)
        if rolls_back and self.checkpoint.every == 0:
            raise ValueError(
                "health.rules: there is nothing to roll back to when checkpoint.every is 0; set it to 1 or more, or "
                "the action of the rule to pause"
            )
        adapt = staleness.adapt_depth
        if adapt is not None and adapt.kl_max is not None and algorithm.beta == 0:
            raise ValueError(
                "staleness.adapt_depth.kl_max: the KL divergence from the reference is measured only when "
                "algorithm.beta is above 0; set algorithm.beta, or leave kl_max out"
            )
        if algorithm.beta == 0 and any(rule.kind == "kl" for rule in self.health.rules):
            raise ValueError(
                "health.rules: the rule 'kl' looks at the KL divergence from the reference, which is measured only "
                "when algorithm.beta is above 0; set algorithm.beta, or leave the rule out"
            )
        lora = self.policy.lora
        if lora is not None and lora.lora_dropout > 0:
            raise ValueError(
                f"policy.lora.lora_dropout: {lora.lora_dropout} would make the policy differ from the replicas that "
                "sample for it, which have no dropout; set it to 0 (recipes of kind 'sft' may have it)"
            )
        depth = staleness.pipeline_depth
        if depth is not None and depth < self.groups_per_batch:
            raise ValueError(
                f"staleness.pipeline_depth: {depth} groups in flight can never fill a batch of "
                f"{self.groups_per_batch}; set it to {self.groups_per_batch} or more, or groups_per_batch to {depth}"
            )
        num_rollouts = self.groups_per_batch * algorithm.num_generations
        if num_rollouts < self.num_teams:
            raise ValueError(
                f"groups_per_batch: a batch of {num_rollouts} rollouts cannot feed {self.num_teams} policy "
                f"{self._learners}; raise groups_per_batch or lower pools.policy.num_workers"
            )
        self._check_sync()
        self._check_critic(stored)
        return self

    def _check_critic(self, stored: bool) -> None:
        if self.algorithm.advantage == "gae":
            if self.pools.critic is None:
                raise ValueError(
                    "pools.critic: algorithm.advantage 'gae' trains a critic, and it has no pool; set pools.critic, "
                    "such as {num_workers: 1, gpus_per_worker: 1}, or algorithm.advantage to 'group'"
                )
            if self.reference_below:
                raise ValueError(
                    "reference: the critic is told the KL penalty of each token by reference workers, and with "
                    "policy.lora there are none; name the model in reference, or set algorithm.beta to 0"
                )
            critic = self.critic or CriticConfig()
            check_teams("critic", critic.sequence_parallel_size, self.pools.critic.num_workers)
            critic.optimizer_like(self.optimizer)
            if critic.warmup_steps >= self.steps and not stored:
                raise ValueError(
                    f"critic.warmup_steps: {critic.warmup_steps} are all steps of the run, so the policy would never "
                    "learn; lower it, or raise steps"
                )
            offload = self.policy.offload
            if offload is not None and critic.zero_stage == 0:
                raise ValueError(
                    "critic.zero_stage: policy.offload holds for the critic, too, and without ZeRO nothing is kept "
                    "apart; set critic.zero_stage to 1 or more, or leave policy.offload out"
                )
            if offload is not None and offload.parameters is not None and critic.zero_stage != 3:
                raise ValueError(
                    "critic.zero_stage: policy.offload holds for the critic, too, and only ZeRO-3 fetches weights when "
                    f"they are needed, not {critic.zero_stage}; set critic.zero_stage to 3, or leave "
                    "policy.offload.parameters out"
                )
            return
        for key, value in (("critic", self.critic), ("pools.critic", self.pools.critic)):
            if value is not None:
                raise ValueError(
                    f"{key}: nobody asks a critic when algorithm.advantage is 'group'; remove {key}, or set "
                    "algorithm.advantage to 'gae'"
                )

    def _check_sync(self) -> None:
        sync, pools = self.sync, self.pools
        for name in ("policy", "rollout"):
            if sync.transport == "nccl" and getattr(pools, name).gpus_per_worker == 0:
                raise ValueError(
                    f"sync.transport: nccl goes from GPU to GPU, and the {name} pool has none; set sync.transport to "
                    f"gloo, or pools.{name}.gpus_per_worker to 1 or more"
                )
        if sync.transport == "nccl" and pools.rollout.colocate_with is not None:
            raise ValueError(
                "sync.transport: nccl takes no two workers on one GPU, and pools.rollout.colocate_with puts the "
                "replicas on the policy's; set sync.transport to gloo"
            )
        if sync.delta and sync.staging != "host":
            raise ValueError(
                f"sync.delta: changes are applied to the version before, which staging {sync.staging!r} does not keep "
                "in host memory; set sync.staging to host, or sync.delta to false"
            )

    @property
    def critic_model(self) -> PretrainedModel | None:
        """The critic's own; None: there is no critic, or it begins as the policy does."""
        return None if self.critic is None else self.critic.model

    @property
    def reference_below(self) -> bool:
        """The reference is the policy without its adapter, which the policy's ranks hold; a `reference` that is named
        has workers of its own, whichever model it is."""
        return self.algorithm.beta > 0 and self.policy.lora is not None and self.reference is None

    @property
    def has_reference_workers(self) -> bool:
        return self.algorithm.beta > 0 and not self.reference_below

    @property
    def watched_health(self) -> HealthConfig:
        """With the rules that are about the method."""
        return self.health.model_copy(
            update={"rules": tuple(rule for rule in self.health.rules if is_about(rule, self))}
        )

    @property
    def logprob_temperature(self) -> float:
        """That log-probabilities are taken at: of GRPO that of sampling, of DPO, as TRL does, 1."""
        return self.generation.temperature if self.online_dpo is None else 1.0

    @property
    def max_groups_per_replica(self) -> int:
        """Groups that one replica may hold, decoding or queued."""
        limit, group_size = self.rollout.max_groups_per_replica, self.algorithm.num_generations
        return limit or max(1, -(-4 * self.rollout.max_num_seqs // group_size))

    @property
    def pipeline_depth(self) -> int:
        """Most groups dispatched and not yet trained, at the start of the run."""
        staleness = self.staleness
        return staleness.pipeline_depth or default_depth(
            groups_per_batch=self.groups_per_batch,
            max_staleness=staleness.max_staleness,
            when_stale=staleness.when_stale,
            over_sampling=staleness.over_sampling,
        )

    @property
    def max_groups_in_flight(self) -> int:
        """Groups that all replicas together may hold, when there are as many as there may be."""
        return self.groups_in_flight(self.pools.rollout.most)

    def groups_in_flight(self, num_replicas: int) -> int:
        """Groups that so many replicas together may hold."""
        return min(self.pipeline_depth, self.max_groups_per_replica * num_replicas)

    @property
    def replica_timeout_s(self) -> float:
        """Longest wait for a replica when there is none: for its machine, if replicas come and go, for a critic that
        computes where it is to be built, and its start."""
        pool, capacity_s, turn_s = self.pools.rollout, 0.0, 0.0
        if pool.elastic:
            capacity_s = self.rollout.capacity_timeout_s
        if pool.colocate_with is not None and self.pools.critic is not None:
            turn_s = self.policy.timeout_s
        return self.rollout.start_timeout_s + capacity_s + turn_s


class SftRecipe(OfflineRecipe):
    """Supervised fine-tuning on prompt-completion data, on the same policy ranks; the loss is on completions only."""

    kind: Literal["sft"]
    assistant_only_loss: bool = False
    """Take whole conversations (a column `messages`), too, and no text. Of any conversation what the assistant says is
    learned and nothing else, whatever this is; of text all that follows the prompt."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        best = self.checkpoint.best
        if best is not None and best.metric.startswith("reward"):
            raise ValueError(
                f"checkpoint.best.metric: supervised runs measure no {best.metric!r}; name another, such as "
                "{metric: loss, mode: min}"
            )
        return self


OfflineKind = SftRecipe | PairRecipe | KtoRecipe
Recipe = GrpoRecipe | OfflineKind
