"""All that a policy's next step depends on, whole on rank 0 and independent of the number of ranks and the ZeRO stage.

    model/model.safetensors   every parameter in training, as the optimizer keeps it: float32; of adapters
                              model/adapter_model.safetensors
    optimizer.safetensors     AdamW's two moments of each, `<name>.exp_avg` and `<name>.exp_avg_sq`
    random.safetensors        torch's random state on each rank, which dropout alone uses
    policy.json               version, steps of the optimizer, the learning-rate schedule and its factor, what adapters
                              are bound to

DeepSpeed's own checkpoints are bound to the ranks and the stage that wrote them.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.host_copy import HostCopies, can_share
from actors.model.files import ADAPTER, METADATA, MODEL, WHOLE

_MOMENTS = ("exp_avg", "exp_avg_sq")


class _Facts(msgspec.Struct, frozen=True):
    version: int
    optimizer_steps: int
    schedule: dict[str, Any]
    learning_rate_factor: float
    base: str | None


@dataclass(frozen=True, slots=True)
class PolicyState:
    """A version of the policy in host memory, apart from the engine that goes on."""

    version: int
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    random: Mapping[str, Tensor]
    """By rank, as bytes: torch's state, and behind it that of the rank's GPU."""
    num_optimizer_steps: int
    schedule: dict[str, Any]
    learning_rate_factor: float = 1.0
    """What the schedule's learning rates are multiplied by."""
    base: str | None = None
    """Digest of the model below, when the weights are adapters."""

    def write(self, folder: Path) -> None:
        (folder / MODEL).mkdir(exist_ok=True)
        save_file(dict(self.weights), folder / MODEL / _weights_file(self.base), metadata=METADATA)
        save_file(dict(self.moments), folder / "optimizer.safetensors")
        save_file(dict(self.random), folder / "random.safetensors")
        facts = _Facts(self.version, self.num_optimizer_steps, self.schedule, self.learning_rate_factor, self.base)
        (folder / "policy.json").write_bytes(msgspec.json.encode(facts))

    def spoiled(self) -> str | None:
        """The first tensor that is not finite throughout; None when all are."""
        for name, value in (*self.weights.items(), *self.moments.items()):
            if value.numel() and not all(torch.isfinite(extreme) for extreme in torch.aminmax(value)):
                return name
        return None

    @classmethod
    def read(cls, folder: Path) -> "PolicyState":
        """ValueError names the file that is missing or none of ours."""
        path = folder / "policy.json"
        try:
            facts = msgspec.json.decode(path.read_bytes(), type=_Facts)
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error
        return cls(
            version=facts.version,
            weights=_tensors(folder / MODEL / _weights_file(facts.base)),
            moments=_tensors(folder / "optimizer.safetensors"),
            random=_tensors(folder / "random.safetensors"),
            num_optimizer_steps=facts.optimizer_steps,
            schedule=facts.schedule,
            learning_rate_factor=facts.learning_rate_factor,
            base=facts.base,
        )


def _weights_file(base: str | None) -> str:
    return WHOLE if base is None else ADAPTER


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: {error}") from error


def collect(
    engine: Any,
    parameters: Mapping[str, Tensor],
    version: int,
    keep: bool,
    base: str | None = None,
    spare: PolicyState | None = None,
) -> PolicyState | None:
    """The state, on the rank that is to `keep` it; every rank is called, for each shard is on one of them.

    The memory of `spare`, an older state that nobody needs any more, is used again: fresh memory costs more time than
    the copy itself.
    """
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    old: Mapping[str, Tensor] = {} if spare is None else {**spare.weights, **spare.moments}
    copies = HostCopies(torch.get_num_threads())
    _link(engine)
    for name, parameter in parameters.items():
        master, both = _master(parameter), [_moment(engine, parameter, moment) for moment in _MOMENTS]
        if keep:
            stays = not _is_gathered(parameter)
            weights[name] = _host(master, old.get(name), copies if stays else None)
            for moment, value in zip(_MOMENTS, both, strict=True):
                moments[f"{name}.{moment}"] = _host(value, old.get(f"{name}.{moment}"), copies if stays else None)
    copies.finish()
    random = _random_states(engine.device)
    if not keep:
        return None
    schedule = plain_schedule(engine.lr_scheduler.state_dict())
    return PolicyState(version, weights, moments, random, _num_steps(engine), schedule, base=base)


def restore(engine: Any, parameters: Mapping[str, Tensor], state: PolicyState) -> None:
    """The engine goes on from `state`; every rank is called with all of it.

    ValueError when the state is not of these parameters.
    """
    _check(parameters, state)
    _link(engine)
    for name, parameter in parameters.items():
        _set_master(parameter, state.weights[name])
        for moment in _MOMENTS:
            _set_moment(engine, parameter, moment, state.moments[f"{name}.{moment}"])
    _set_num_steps(engine, state.num_optimizer_steps)
    engine.lr_scheduler.load_state_dict(state.schedule)
    for group, learning_rate in zip(engine.optimizer.param_groups, engine.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = learning_rate
    _set_random_state(engine.device, state.random)


def _check(parameters: Mapping[str, Tensor], state: PolicyState) -> None:
    expected = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
    _compare("policy", expected, state.weights)
    _compare("optimizer", {f"{name}.{m}": shape for name, shape in expected.items() for m in _MOMENTS}, state.moments)


def _compare(part: str, expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    saved = {name: tuple(value.shape) for name, value in tensors.items()}
    if differing := sorted(name for name in {*expected, *saved} if expected.get(name) != saved.get(name)):
        raise ValueError(
            f"the checkpoint's {part} is of another model: {len(differing)} tensors differ, such as {differing[0]} "
            f"({saved.get(differing[0])} there, {expected.get(differing[0])} here)"
        )


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """Of all ranks, on each of them."""
    state = torch.get_rng_state()
    if device.type == "cuda":
        state = torch.cat([state, torch.cuda.get_rng_state(device)])
    mine = state.to(device)
    states = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(states, mine)
    return {str(rank): each.cpu() for rank, each in enumerate(states)}


def _set_random_state(device: torch.device, states: Mapping[str, Tensor]) -> None:
    """A rank that was not there when the state was taken goes on as it began."""
    state = states.get(str(torch.distributed.get_rank()))
    if state is None:
        return
    size = torch.get_rng_state().numel()
    torch.set_rng_state(state[:size])
    if device.type == "cuda" and state.numel() > size:
        torch.cuda.set_rng_state(state[size:], device)


def _is_sharded(parameter: Tensor) -> bool:
    """Whether DeepSpeed keeps master and moments apart from the parameter (ZeRO, bf16)."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")


def _fragment(parameter: Tensor, moment: str | None = None) -> Tensor | None:
    """What one rank alone keeps of the parameter, in place; DeepSpeed would sum it with zeros over its one rank."""
    group: Any = getattr(parameter, "_dp_group", None)
    if getattr(parameter, "_hp_mapping", None) is None or torch.distributed.get_world_size(group) > 1:
        return None
    kept: Tensor = parameter._hp_mapping.get_hp_fragment(moment)  # type: ignore[attr-defined]
    return kept.view(parameter.shape)


def _is_gathered(parameter: Tensor) -> bool:
    """Whether master and moments are made whole when they are asked for; else they lie where the next step finds
    them."""
    return _is_sharded(parameter) and _fragment(parameter) is None


def _master(parameter: Tensor) -> Tensor:
    if not _is_sharded(parameter):
        return parameter.detach()
    if (whole := _fragment(parameter)) is not None:
        return whole
    from deepspeed.utils import safe_get_full_fp32_param

    master: Tensor = safe_get_full_fp32_param(parameter)
    return master


def _moment(engine: Any, parameter: Tensor, moment: str) -> Tensor:
    if not _is_sharded(parameter):
        value: Tensor = engine.optimizer.state[parameter][moment]
        return value
    if (kept := _fragment(parameter, moment)) is not None:
        return kept
    from deepspeed.utils import safe_get_full_optimizer_state

    whole: Tensor = safe_get_full_optimizer_state(parameter, moment)
    return whole


@torch.no_grad()
def _set_master(parameter: Tensor, value: Tensor) -> None:
    if _is_sharded(parameter):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value)
    with _whole(parameter):
        parameter.data.copy_(value)


def _set_moment(engine: Any, parameter: Tensor, moment: str, value: Tensor) -> None:
    if _is_sharded(parameter):
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value, moment)
    else:
        engine.optimizer.state[parameter][moment].copy_(value)


def _whole(parameter: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Under ZeRO-3 what is written inside reaches every rank's shard."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    whole: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
    return whole


def _link(engine: Any) -> None:
    """AdamW has its moments, zeros before its first step, and DeepSpeed knows where each parameter's are.

    ZeRO 1 and 2 look once, after the first step of the first parameter group, when the others' are not there yet.
    """
    adamw = _adamw(engine)
    for parameter in _kept(engine):
        if not adamw.state[parameter]:
            zeros = {moment: torch.zeros_like(parameter) for moment in _MOMENTS}
            adamw.state[parameter] = {"step": torch.tensor(0.0), **zeros}
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _kept(engine: Any) -> list[Tensor]:
    """What AdamW steps: this rank's flat partitions under ZeRO, else the parameters."""
    for flat in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):  # stage 3, stages 1 and 2
        if hasattr(engine.optimizer, flat):
            return list(getattr(engine.optimizer, flat))
    return [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]


def _adamw(engine: Any) -> Any:
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):  # DeepSpeed's wrappers
        optimizer = optimizer.optimizer
    return optimizer


def _num_steps(engine: Any) -> int:
    """AdamW's count, by which it corrects its moments."""
    return max(int(state["step"]) for state in _adamw(engine).state.values())


def _set_num_steps(engine: Any, num_steps: int) -> None:
    for state in _adamw(engine).state.values():
        state["step"].fill_(num_steps)


def plain_schedule(state: Mapping[str, Any]) -> dict[str, Any]:
    """Of a scheduler's state what JSON can hold; its functions are made anew from the recipe."""
    return {name: value for name, value in state.items() if name != "lr_lambdas"} | {
        "lr_lambdas": [None] * len(state.get("lr_lambdas", []))
    }


def _host(value: Tensor, held: Tensor | None, later: HostCopies | None) -> Tensor:
    """A copy in host memory, in that of `held` if it fits; page-locked, for speed, when it comes from a GPU.

    It may be made `later`, together with others.
    """
    if held is None or held.shape != value.shape or held.dtype != value.dtype:
        held = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
    if later is None or not can_share(held, value):
        return held.copy_(value.detach())
    later.add(held, value)
    return held
