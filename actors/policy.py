"""The policy is the only owner of the weights: each step trains on one batch and makes version + 1.

One PolicyActor is one DeepSpeed rank. All ranks receive the same calls in the same order; each trains its own
micro-batches, and the gradient is that of the global batch whatever the number of ranks, the ZeRO stage or the split
into micro-batches (`loss_type: bnpo` alone depends on the split, by definition).
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import TCPStore

from actors.errors import RunError
from actors.model.team import SOLO, Team
from actors.policy_calls import PolicySettings, RankBatch, RankUpdate, ReferenceSums
from actors.policy_state import PolicyState, collect, restore
from algorithms.corrections import sequence_sum
from algorithms.losses import Normalizer
from algorithms.packed import PackedRow, pack_row
from algorithms.stats import LossStats, merge
from algorithms.types import Group, MicroBatch, Rollout, ScoredGroup, kl_sums
from placement.home import check_home
from sync.gloo import open_store, reach_store
from sync.layout import parameters_of, plan_layout
from sync.member import Membership
from sync.sender import Sender, Sent
from sync.transport import Kind, Ticket, Transport, open_wire

if TYPE_CHECKING:
    pass

CONTROL, IO = "control", "io"
"""Concurrency groups, one call each, that are answered while a rank trains or sends."""

_MEET_TIMEOUT_S = 1800.0
"""For the ranks to meet, and for each of their collective operations, or longer where a step may take longer: the
controller's deadlines, which name who is late, come first."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """One pass over the rank's micro-batches, and the update that it ends with."""

    loss: float
    grad_norm: float
    learning_rate: float
    stats: LossStats
    stepped: bool


class PolicyActor:
    """One rank of the policy."""

    def __init__(self, rank: int, settings: PolicySettings) -> None:
        self.rank = rank
        self.settings = settings
        self.version = 0
        self._learning_rate_factor = 1.0
        self._sender: Sender | None = None
        self._wire: Transport | None = None
        self._snapshot: PolicyState | None = None
        self._meeting: TCPStore | None = None
        self._timeout = timedelta(seconds=max(_MEET_TIMEOUT_S, settings.policy.timeout_s + 60.0))
        self._writing = False
        """The snapshot is being written: the next one must not take its memory."""
        self._teacher: Any = None
        self._team = SOLO
        """Those that compute each row with this rank."""
        self._base: str | None = None
        """Digest of the frozen weights below an adapter."""

    def ping(self) -> None:
        """The process answers; asked beside its work, under CONTROL."""

    def address(self) -> tuple[str, int]:
        """This process's address and the port at which it serves the ranks' rendezvous, there and nowhere else."""
        self._meeting = open_store(node_ip(), self._timeout.total_seconds())
        return node_ip(), self._meeting.port

    def start(self, host: str, port: int) -> None:
        """Load the model and join the other ranks at `host:port`."""
        settings = self.settings
        check_home()
        if self.rank == 0 and not Path(settings.run_dir).is_dir():
            raise RunError(
                f"run_dir: the node of policy rank 0 ({node_ip()}) does not see {settings.run_dir}; "
                "put run_dir on storage that all nodes share"
            )
        os.environ |= {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(settings.num_ranks),
            "LOCAL_RANK": "0",  # Ray shows each actor its own GPUs only
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": "cuda" if settings.use_gpu else "cpu",
        }
        import deepspeed
        from transformers import set_seed

        from actors.model.learner import load_learner
        from actors.model.lora import trained_parameters
        from actors.model.optimizer import adamw, deepspeed_config, schedule
        from actors.model.teacher import load_teacher

        # DeepSpeed would compile a shared-memory all-reduce that training never calls, under a file lock that a process
        # killed meanwhile leaves behind: every later start would wait for it without end.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        torch.set_num_threads(settings.policy.num_threads or max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        set_seed(settings.seed)
        backend = "nccl" if settings.use_gpu else "gloo"
        self._meet(host, port, backend)
        deepspeed.init_distributed(backend, verbose=False, timeout=self._timeout)  # takes the group that is there
        self._team = Team.join(self.rank, settings.num_ranks, settings.policy.sequence_parallel_size, self._timeout)
        model, self._base = load_learner(settings)
        optimizer = adamw(model, settings.optimizer)
        self.pad_id = max(0, model.config.pad_token_id or 0)  # some models say -1, which no embedding has
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=schedule(optimizer, settings.optimizer, settings.num_steps, settings.objective.num_iterations),
            config=deepspeed_config(settings.policy, settings.optimizer),
        )
        self.engine.train()
        if settings.teacher is not None:
            size = settings.policy.sequence_parallel_size
            self._teacher = load_teacher(settings.teacher, settings.policy.dtype, size).to(self.engine.device)
        self._parameters: dict[str, Any] = trained_parameters(self.engine.module)
        self._leave_room()

    def _leave_room(self) -> None:
        """What torch keeps for the next step is there for whoever shares the GPU."""
        if self.settings.shares_gpu:
            torch.cuda.empty_cache()

    def _meet(self, host: str, port: int, backend: str) -> None:
        """All ranks are one process group when this returns."""
        self._meeting = self._meeting or reach_store(host, port, self.rank, self._timeout.total_seconds())
        num_ranks = self.settings.num_ranks
        torch.distributed.init_process_group(
            backend, timeout=self._timeout, store=self._meeting, rank=self.rank, world_size=num_ranks
        )

    def step(self, batch: RankBatch, *groups: ScoredGroup | Group) -> RankUpdate:
        """Train on this rank's share of one batch, `num_iterations` times over; the version grows by one.

        A loss that is not finite on any rank, or a gradient that is not, reaches neither the weights nor AdamW's state.
        """
        num_iterations = self.settings.objective.num_iterations
        passes: list[_Pass] = []
        starts: dict[int, Tensor] = {}
        rows = [self._referred(micro_batch, groups, batch.oldest_version) for micro_batch in batch.micro_batches]
        while len(passes) < num_iterations and all(one.stepped for one in passes):
            passes.append(self._pass(rows, batch.normalizer, starts))
        done = [one for one in passes if one.stepped]
        for _ in range(num_iterations - len(done)):
            self.engine.lr_scheduler.step()  # a completed batch has its place in the schedule
        self.version += 1
        self._leave_room()
        counted = done or passes
        return RankUpdate(
            version=self.version,
            loss=sum(one.loss for one in counted) / len(counted),
            grad_norm=counted[-1].grad_norm,
            learning_rate=counted[0].learning_rate,
            stats=merge(one.stats for one in counted).to_dict(),
            learning_rate_factor=self._learning_rate_factor,
            skipped=not done,
            num_updates=len(done),
        )

    def rest(self, batch: RankBatch, *groups: ScoredGroup | Group) -> RankUpdate:
        """Complete a batch without learning from it; it has its place in the schedule all the same."""
        learning_rate = self._set_learning_rate()
        for _ in range(self.settings.objective.num_iterations):
            self.engine.lr_scheduler.step()
        self.version += 1
        stats = LossStats().to_dict()
        factor = self._learning_rate_factor
        return RankUpdate(self.version, 0.0, 0.0, learning_rate, stats, factor, num_updates=0)

    def _pass(self, rows: Sequence[PackedRow], normalizer: Normalizer, starts: dict[int, Tensor]) -> _Pass:
        """One update of the policy; the first leaves in `starts` the log-probabilities that the step began with."""
        objective = self.settings.objective
        losses, stats = [], []
        for index, row in enumerate(rows):
            self.engine.set_gradient_accumulation_boundary(index == len(rows) - 1)
            values_N, entropy_N = self._values(row)
            start_N = starts.setdefault(index, values_N.detach())
            loss, micro_stats = objective.loss(row, values_N, entropy_N, start_N, normalizer)
            # DeepSpeed averages gradients over the ranks; our shares are to be summed.
            self.engine.backward(loss * self.settings.num_ranks)
            losses.append(loss.item())
            stats.append(micro_stats)
        learning_rate = self._set_learning_rate()
        if self._is_true_anywhere(not all(map(math.isfinite, losses))):
            self._spoil_gradient()
        grad_norm, stepped = self._step_optimizer()
        return _Pass(sum(losses), grad_norm, learning_rate, merge(stats), stepped)

    def scale_learning_rate(self, factor: float) -> None:
        """From the next step on, beside the schedule; every rank is called."""
        self._learning_rate_factor *= factor

    def _set_learning_rate(self) -> float:
        """The schedule's times the factor; returns it for the first group of parameters."""
        schedule = self.engine.lr_scheduler.get_last_lr()
        for group, learning_rate in zip(self.engine.optimizer.param_groups, schedule, strict=True):
            group["lr"] = learning_rate * self._learning_rate_factor
        return float(self.engine.get_lr()[0])

    def _row(self, micro_batch: MicroBatch, groups: Sequence[ScoredGroup | Group], oldest_version: int) -> PackedRow:
        samples = micro_batch.samples
        rollouts = [_rollouts(groups[sample.group])[sample.rollout] for sample in samples]
        advantages = [sample.advantage if sample.advantages_L is None else sample.advantages_L for sample in samples]
        row = pack_row(rollouts, advantages, self.pad_id, oldest_version, self.version)
        return row.to(self.engine.device)

    def _referred(
        self, micro_batch: MicroBatch, groups: Sequence[ScoredGroup | Group], oldest_version: int
    ) -> PackedRow:
        row = self._row(micro_batch, groups, oldest_version)
        return self.settings.objective.referred(self.engine, row, self._team)

    def _values(self, row: PackedRow) -> tuple[Tensor, Tensor]:
        """What the model says of each loss token of the row, and the entropies there."""
        return self.settings.objective.values(self.engine, row, self._teacher, self._team)

    def references(self, batch: RankBatch, *groups: ScoredGroup | Group) -> list[list[ReferenceSums]]:
        """What the reference says of each sample of each micro-batch; every rank is called."""
        sums = []
        for micro_batch in batch.micro_batches:
            row = self._referred(micro_batch, groups, batch.oldest_version)
            sums.append(_sums(row) if micro_batch.samples else [])
        return sums

    def numbers(self, batch: RankBatch, *groups: ScoredGroup | Group) -> list[list[float]]:
        """Log-probability, or score, of each sample of each micro-batch, without dropout; every rank is called."""
        self.engine.eval()
        numbers = []
        with torch.no_grad():
            for micro_batch in batch.micro_batches:
                row = self._row(micro_batch, groups, batch.oldest_version)
                values_N, _ = self._values(row)
                numbers.append(sequence_sum(values_N.double(), row.sequence_N, len(micro_batch.samples)).tolist())
        self.engine.train()
        return numbers

    def _step_optimizer(self) -> tuple[float, bool]:
        """The global gradient norm before clipping, and whether it was finite and the optimizer stepped.

        The gradient is reduced over the ranks before its norm is taken, so that all ranks decide alike.
        """
        max_norm = self.settings.optimizer.max_grad_norm
        if self.settings.policy.zero_stage == 0 and self.settings.policy.dtype == "float32":
            # Without ZeRO and mixed precision DeepSpeed clips, but keeps the norm to itself and looks at nothing.
            grads = [p.grad for p in self._parameters.values() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads).item()
            if not math.isfinite(norm):
                self.engine.zero_grad()
                return norm, False
            self.engine.step()
            return norm, True
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        assert norm is not None, f"DeepSpeed reports no gradient norm (clipping at {max_norm})"
        return float(norm), self.engine.was_step_applied()

    def _is_true_anywhere(self, fact: bool) -> bool:
        """Whether it is on any rank; every rank is called."""
        flag = torch.tensor(float(fact), device=self.engine.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    def _spoil_gradient(self) -> None:
        """Make the gradient not finite, so that the one check of it, DeepSpeed's, holds for the loss too."""
        from deepspeed.utils import safe_set_full_grad

        for parameter in self._parameters.values():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            safe_set_full_grad(parameter, torch.full(shape, math.nan, device=self.engine.device))

    # Weights -----------------------------------------------------------------------------------------------------

    def plan_weights(self, dtype: str, bucket_mb: float) -> str:
        """The layout in which the parameters that are trained travel, as JSON; the same on every rank."""
        shapes = ((name, getattr(p, "ds_shape", p.shape)) for name, p in self._parameters.items())
        layout = plan_layout(parameters_of(shapes, dtype), int(bucket_mb * 2**20))
        return layout.to_json()

    def open_wire(self, transport: Kind, timeout_s: float) -> Ticket:
        """Rank 0 opens the rendezvous of a broadcast group; what the other members must know."""
        self._opened = open_wire(transport, node_ip(), timeout_s)
        return self._opened.ticket

    def join_weights(self, membership: Membership) -> None:
        """Take part in publications: rank 0 joins the broadcast group, the others only gather."""
        config = membership.config
        if self._wire is not None:
            self._wire.close()
        if self.rank == 0:
            device = self.engine.device if config.transport == "nccl" else torch.device("cpu")
            self._wire = membership.join(node_ip(), device, self._opened)
        self._sender = Sender(membership.layout, self._wire, delta=config.delta, full_every=config.full_every)

    def abort_weights(self) -> None:
        """A publication under way fails at once, or the next one does: somebody who must receive it is gone."""
        if self._wire is not None:
            self._wire.abort()

    def send_weights(self) -> Sent:
        """Stream the current version; every rank is called, rank 0 sends."""
        assert self._sender is not None, "join_weights comes first"
        try:
            return self._sender.send(self.version, self._gather)
        finally:
            self._leave_room()

    @contextlib.contextmanager
    def _gather(self, names: tuple[str, ...]) -> Iterator[Mapping[str, Tensor]]:
        parameters = {name: self._parameters[name] for name in names}
        with self._whole(list(parameters.values())):
            yield parameters

    @contextlib.contextmanager
    def _whole(self, parameters: list[Any]) -> Iterator[None]:
        """The parameters are whole on this rank while the context is open; all ranks enter it for the same ones."""
        import deepspeed

        sharded = self.settings.policy.zero_stage == 3
        whole = deepspeed.zero.GatheredParameters(parameters) if sharded else contextlib.nullcontext()
        with whole, torch.no_grad():
            yield

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """Log-probability of each loss token under the current weights; every rank is called with the same rollouts."""
        row = pack_row(rollouts, [0.0] * len(rollouts), self.pad_id).to(self.engine.device)
        with torch.no_grad():
            logprobs_N, _ = self._values(row)
        return [logprobs_N[row.sequence_N == index].tolist() for index in range(len(rollouts))]

    # Checkpoints -------------------------------------------------------------------------------------------------

    def snapshot(self) -> None:
        """Copy all that the next step depends on to the host of rank 0; every rank is called."""
        spare = None if self._writing else self._snapshot
        keep = self.rank == 0
        state = collect(self.engine, self._parameters, self.version, keep, self._base, spare)
        self._snapshot = state and replace(state, learning_rate_factor=self._learning_rate_factor)
        self._leave_room()

    def write_snapshot(self, folder: Path) -> str | None:
        """Rank 0 writes the snapshot, while training goes on: its weights are a model that others load as it is.

        It is kept until the next one is taken, and may be written again. The name of a tensor that is not finite, when
        there is one: nothing is written then.
        """
        from actors.model.files import MODEL, describe
        from actors.model.lora import describe_adapter

        assert self._snapshot is not None, "snapshot comes first, and rank 0 keeps it"
        snapshot, self._writing = self._snapshot, True
        try:
            spoiled = snapshot.spoiled()
            if spoiled is None:
                snapshot.write(folder)
                (describe if self._base is None else describe_adapter)(self.engine.module, folder / MODEL)
        finally:
            self._writing = False
        return spoiled

    def restore(self, folder: Path) -> None:
        """Go on from what `write_snapshot` has left; every rank is called."""
        try:
            state = PolicyState.read(folder)
            if state.base is not None and self._base is not None and state.base != self._base:
                raise ValueError(
                    f"the adapter was trained on other weights than those of {self.settings.model_path}; go on with "
                    "the model that the run began with, or begin anew with --overwrite"
                )
            restore(self.engine, self._parameters, state)
        except ValueError as error:
            raise RunError(f"{folder}: {error}") from error
        self.version = state.version
        self._learning_rate_factor = state.learning_rate_factor
        self._leave_room()

    def save(self, folder: Path) -> None:
        """Leave the weights in Hugging Face layout (safetensors) in `folder`; every rank is called, rank 0 writes.

        Adapters are merged there, and lie in peft's layout in a folder of their own beside.
        """
        from actors.model.lora import ADAPTER_FOLDER, merged, save_adapter, sources
        from actors.model.quantize import save_over_the_whole

        module, lora = self.engine.module, self.settings.policy.lora
        its_own = {name: [parameter] for name, parameter in self._parameters.items()}
        if lora is not None and lora.quantize is not None:
            adapter = self._copied(its_own, lambda parts: merged(parts, 1.0))
            if self.rank == 0:
                save_over_the_whole(adapter, module, self.settings, folder)
            return
        parameters: dict[str, Any] = dict(module.named_parameters())
        plan = {name: [parameters[part] for part in parts] for name, parts in sources(parameters).items()}
        scaling = lora.lora_alpha / lora.r if lora is not None else 1.0
        model = self._copied(plan, lambda parts: merged(parts, scaling))
        if self.rank == 0:
            module.save_pretrained(folder, state_dict=model)
        if lora is None:
            return
        adapter = self._copied(its_own, lambda parts: merged(parts, 1.0))
        if self.rank == 0:
            save_adapter(module, adapter, folder / ADAPTER_FOLDER)

    def _copied(
        self, plan: Mapping[str, Sequence[Any]], make: Callable[[Sequence[Tensor]], Tensor]
    ) -> dict[str, Tensor]:
        """What `make` makes of each entry's parameters, on rank 0; one entry at a time is whole on the device."""
        made: dict[str, Tensor] = {}
        for name, parts in plan.items():
            with self._whole(list(parts)):
                if self.rank == 0:
                    made[name] = make(parts)
        return made


def policy_actor() -> Any:
    """The class to make ranks of; its concurrency groups can be given to Ray at no later moment."""
    import ray

    remote: Any = ray.remote
    return remote(concurrency_groups={CONTROL: 1, IO: 1})(PolicyActor)


def node_ip() -> str:
    """The address under which the other nodes reach this one."""
    import ray

    return ray.util.get_node_ip_address()


def _sums(row: PackedRow) -> list[ReferenceSums]:
    """Of each sequence of the row."""
    assert row.reference_logprobs_N is not None, "nobody has asked the reference"
    reference_N, sampled_N, sequence_N = (
        values_N.cpu().numpy() for values_N in (row.reference_logprobs_N, row.sampled_logprobs_N, row.sequence_N)
    )
    sums = []
    for place in range(len(row.lengths_S)):
        reference_L, sampled_L = (values_N[sequence_N == place].astype(float) for values_N in (reference_N, sampled_N))
        sums.append(ReferenceSums(float(reference_L.sum()), kl_sums(sampled_L - reference_L)))
    return sums


def _rollouts(group: ScoredGroup | Group) -> tuple[Rollout, ...]:
    return group.group.rollouts if isinstance(group, ScoredGroup) else group.rollouts
