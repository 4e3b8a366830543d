"""A recipe is the whole configuration of one run: frozen, closed, and checked before anything is started.

`load_recipe` reads one YAML file and `dotted.key=value` overrides (see file.py for how keys are checked).
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from actors.checkpoint.config import CheckpointConfig
from algorithms.config import GrpoConfig, OptimizerConfig, StalenessConfig
from algorithms.health.config import HealthConfig
from algorithms.pacing import default_depth
from algorithms.simulation.config import SimulationConfig
from placement.config import PoolsConfig
from sync.config import SyncConfig

CLOSED = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PretrainedModel(BaseModel):
    """A Hugging Face causal language model: a hub name or a local folder in Hugging Face layout."""

    model_config = CLOSED

    kind: Literal["pretrained"]
    path: str = Field(min_length=1)
    revision: str | None = None
    """Commit, tag or branch on the hub; null takes the default branch."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model; off unless you trust its author."""


class TinyModel(BaseModel):
    """A byte-level Qwen3-type model with random weights, made from this config: for demos and tests without a hub."""

    model_config = CLOSED

    kind: Literal["tiny"]
    hidden_size: int = Field(128, ge=32)
    num_layers: int = Field(4, ge=1)
    num_heads: int = Field(2, ge=1)
    max_position_embeddings: int = Field(256, ge=16)
    tie_word_embeddings: bool = False


class RecipeModel(BaseModel):
    """The model that another recipe's run leaves behind; that recipe is trained first when it has not run yet."""

    model_config = CLOSED

    kind: Literal["recipe"]
    recipe: str = Field(min_length=1)
    """Path of the other recipe's YAML file, relative to the working directory."""


ModelConfig = Annotated[PretrainedModel | TinyModel | RecipeModel, Field(discriminator="kind")]


ReferenceConfig = Annotated[PretrainedModel | RecipeModel, Field(discriminator="kind")]


class DatasetConfig(BaseModel):
    """Where prompts come from: a hub name, a local file, or a generated task of reasoning-gym."""

    model_config = CLOSED

    path: str = Field(min_length=1)
    """Hub name, `*.jsonl`, `*.json`, `*.parquet`, `*.csv`, a folder saved by `datasets`, or `reasoning_gym:<task>`."""
    name: str | None = None
    """Configuration of the hub data set."""
    split: str = "train"
    revision: str | None = None
    task: dict[str, Any] = {}
    """Settings of the reasoning-gym task, such as `{min_word_len: 3}`."""
    size: int | None = Field(None, ge=1)
    """Use this many rows; required for reasoning-gym tasks, which are endless."""
    seed: int = 0
    """Seed of the generated task (which words, which numbers), not of the order of the rows."""
    prompt_suffix: str = ""
    """Appended to every standard (string) prompt, such as `\\nAnswer: `."""
    shuffle: bool = True
    max_bad_rows: int = Field(0, ge=0)
    """Rows that cannot be prompts are set aside and told; more of them than this stop the run."""


class RewardConfig(BaseModel):
    """One reward function: `f(prompts, completions, completion_ids, **columns) -> list[float | None]`."""

    model_config = CLOSED

    function: str = Field(min_length=1)
    """`path/to/file.py:name` or `package.module:name`; sync or async."""
    weight: float = 1.0


class RewardsConfig(BaseModel):
    """The reward functions and the deadline that each call has."""

    model_config = CLOSED

    functions: tuple[RewardConfig, ...] = Field(min_length=1)
    timeout_s: float = Field(30.0, gt=0.0)
    """A call that takes longer is killed; its completions are unscorable, never 0."""
    max_failed_share: float = Field(0.1, ge=0.0, le=1.0)
    """A run stops when calls failed in more than this share of its last 100 groups; 1.0 tolerates every failure."""


class GenerationConfig(BaseModel):
    """How rollouts are sampled; names are TRL's."""

    model_config = CLOSED

    max_completion_length: int = Field(256, ge=1)
    """Longest completion (tokens)."""
    max_prompt_length: int = Field(512, ge=1)
    """Longest prompt (tokens); a longer one is an error that names the row."""
    temperature: float = Field(1.0, gt=0.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=0)
    """0 keeps every token."""
    timeout_s: float = Field(600.0, gt=0.0)
    """Deadline of one group's generation."""


class LoraConfig(BaseModel):
    """Adapters on linear layers are trained and published, and the model below them never moves; names are peft's."""

    model_config = CLOSED

    r: int = Field(16, ge=1, le=512)
    """Rank of the adapters."""
    lora_alpha: int = Field(32, ge=1)
    """What an adapter adds is scaled by lora_alpha / r."""
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of an adapter's inputs that training leaves out; for supervised recipes."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """`all-linear`, which leaves out the output head alone, or names of linear layers such as `[q_proj, v_proj]`."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names(cls, given: Any) -> Any:
        if given == "all-linear":
            return given
        if not (isinstance(given, list | tuple) and given and all(isinstance(name, str) and name for name in given)):
            raise ValueError(
                "target_modules: write all-linear, or a list with the names of one or more linear layers, such as "
                "[q_proj, v_proj]"
            )
        return tuple(given)


class PolicyConfig(BaseModel):
    """The model in training: one DeepSpeed rank per worker of the policy pool."""

    model_config = CLOSED

    zero_stage: int = Field(1, ge=0, le=3)
    """DeepSpeed ZeRO: 0 replicates everything, 1 shards the optimizer, 2 the gradients too, 3 the weights too."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_tokens_per_micro_batch: int = Field(8192, ge=16)
    """Token budget of one forward pass."""
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None
    """Train and publish adapters only; null trains and publishes every weight."""
    num_threads: int | None = Field(None, ge=1)
    """CPU threads of each rank; null takes the pool's cpus_per_worker, at least 1."""
    timeout_s: float = Field(1800.0, gt=0.0)
    """Deadline of one step."""
    max_restarts: int = Field(3, ge=0)
    """When a rank dies or hangs, all ranks are built again and go on from the last checkpoint, and the replicas keep
    their engines; one more time than this stops the run. (A supervised run stops at once.)"""


class RolloutConfig(BaseModel):
    """The inference engines: one vLLM AsyncLLM per worker of the rollout pool."""

    model_config = CLOSED

    dtype: Literal["float32", "bfloat16"] = "float32"
    max_num_seqs: int = Field(128, ge=1)
    """Sequences that one replica decodes at once."""
    max_groups_per_replica: int | None = Field(None, ge=1)
    """Most groups that one replica holds, decoding or queued; null takes 4 x max_num_seqs / num_generations, so that
    its slots stay full although most rollouts of a group end before its longest. More would only grow stale there."""
    gpu_memory_utilization: float = Field(0.85, gt=0.0, le=1.0)
    cpu_kv_cache_gb: int = Field(1, ge=1)
    """KV cache of a replica on the CPU (GiB)."""
    enforce_eager: bool | None = None
    """Run without CUDA graphs; null is true on the CPU and false on GPUs."""
    num_threads: int | None = Field(None, ge=1)
    """CPU threads of each replica; null lets vLLM choose."""
    start_timeout_s: float = Field(600.0, gt=0.0)
    """Deadline of an engine's start."""
    max_attempts: int = Field(3, ge=1)
    """A group whose generation fails this often is quarantined."""
    max_rebuilds: int = Field(10, ge=0)
    """Replicas that fail are rebuilt while the others go on; more failures than this stop the run."""
    max_quarantined: int = Field(0, ge=0)
    """More quarantined groups than this stop the run."""


class LivenessConfig(BaseModel):
    """Every worker is asked for a sign of life now and then; one that gives none is taken for dead."""

    model_config = CLOSED

    every_s: float = Field(10.0, gt=0.0)
    timeout_s: float = Field(60.0, ge=1.0)
    """Longest wait for an answer. An engine answers between two of its steps, so this is longer than any of them."""
    max_restarts: int = Field(10, ge=0)
    """How often each reward and each reference worker is started again; one more death stops the run."""


class LoggingConfig(BaseModel):
    """What the run folder keeps besides the metrics."""

    model_config = CLOSED

    completions_every: int = Field(10, ge=1)
    """Steps between two samples of completions."""
    num_completions: int = Field(8, ge=0)
    """Completions in each sample."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project; the key comes from the environment (WANDB_API_KEY, WANDB_MODE)."""


class StallConfig(BaseModel):
    """What to do when no group finishes while the policy waits."""

    model_config = CLOSED

    timeout_s: float | None = Field(None, gt=0.0)
    """For so long; null takes twice the longest that a group may take by its own deadlines."""
    then: Literal["exit", "retry"] = "exit"
    """`exit` leaves a checkpoint and ends the run with a sentence that names the suspect; `retry` replaces the suspect,
    as often as `rollout.max_rebuilds` and `liveness.max_restarts` allow, and goes on (unless it is the policy)."""


class _Recipe(BaseModel):
    model_config = CLOSED

    name: str = Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,45}[a-z0-9])?$")
    """Name of the run: lower-case letters, digits and dashes, at most 47 characters."""
    seed: int = Field(0, ge=0)
    steps: int = Field(ge=1)
    """Updates of the policy."""
    run_dir: Path | None = None
    """Where the run leaves everything; null takes `runs/<name>`."""
    model: ModelConfig
    dataset: DatasetConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    policy: PolicyConfig = PolicyConfig()
    pools: PoolsConfig = PoolsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _one_gpu_a_rank(self) -> Self:
        for name in ("policy", "reference"):
            gpus = getattr(self.pools, name).gpus_per_worker
            if gpus > 1:
                raise ValueError(
                    f"pools.{name}.gpus_per_worker: {gpus}, but each {name} worker drives one GPU; raise "
                    f"pools.{name}.num_workers instead"
                )
        return self

    @property
    def folder(self) -> Path:
        return self.run_dir or Path("runs") / self.name


class GrpoRecipe(_Recipe):
    """Asynchronous GRPO: rollouts on one pool, the policy on another, at most `max_staleness` versions apart."""

    kind: Literal["grpo"]
    groups_per_batch: int = Field(ge=1)
    """Prompt groups that one update trains on."""
    algorithm: GrpoConfig = GrpoConfig()
    reference: ReferenceConfig | None = None
    """The model that the KL penalty is measured against, with the policy's tokenizer; null takes the policy's initial
    weights. With `algorithm.kl_penalty: advantage` it is a teacher."""
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
    def _sound(self) -> Self:
        staleness, algorithm = self.staleness, self.algorithm
        if staleness.max_staleness > 0 and not algorithm.corrects_off_policy:
            raise ValueError(
                f"staleness.max_staleness: {staleness.max_staleness} trains on stale samples without an off-policy "
                "correction; set algorithm.vllm_importance_sampling_correction to true, algorithm.old_logprobs to "
                "'sampled', or staleness.max_staleness to 0"
            )
        if self.reference is not None and algorithm.beta == 0:
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
        if num_rollouts < self.pools.policy.num_workers:
            raise ValueError(
                f"groups_per_batch: a batch of {num_rollouts} rollouts cannot feed "
                f"{self.pools.policy.num_workers} policy ranks; raise groups_per_batch or lower "
                "pools.policy.num_workers"
            )
        self._check_sync()
        return self

    def _check_sync(self) -> None:
        sync, pools = self.sync, self.pools
        for name in ("policy", "rollout"):
            if sync.transport == "nccl" and getattr(pools, name).gpus_per_worker == 0:
                raise ValueError(
                    f"sync.transport: nccl goes from GPU to GPU, and the {name} pool has none; set sync.transport to "
                    f"gloo, or pools.{name}.gpus_per_worker to 1 or more"
                )
        if sync.delta and sync.staging != "host":
            raise ValueError(
                f"sync.delta: changes are applied to the version before, which staging {sync.staging!r} does not keep "
                "in host memory; set sync.staging to host, or sync.delta to false"
            )

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
        """Groups that all replicas together may hold."""
        return min(self.pipeline_depth, self.max_groups_per_replica * self.pools.rollout.num_workers)


class SftRecipe(_Recipe):
    """Supervised fine-tuning on prompt-completion data, on the same policy ranks; the loss is on completions only."""

    kind: Literal["sft"]
    batch_size: int = Field(ge=1)
    """Sequences that one update trains on."""
    max_length: int = Field(1024, ge=2)
    """Longest sequence (tokens), prompt and completion together; a longer one is an error that names the row."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.dataset.max_bad_rows > 0:
            raise ValueError(
                f"dataset.max_bad_rows: {self.dataset.max_bad_rows}, but supervised runs set no row aside; remove it, "
                "and the bad rows"
            )
        best = self.checkpoint.best
        if best is not None and best.metric.startswith("reward"):
            raise ValueError(
                f"checkpoint.best.metric: supervised runs measure no {best.metric!r}; name another, such as "
                "{metric: loss, mode: min}"
            )
        if self.batch_size < self.pools.policy.num_workers:
            raise ValueError(
                f"batch_size: {self.batch_size} sequences cannot feed {self.pools.policy.num_workers} policy ranks; "
                "raise batch_size or lower pools.policy.num_workers"
            )
        return self


Recipe = GrpoRecipe | SftRecipe
