"""All that a policy's next step depends on, whole on rank 0 and independent of the number of ranks and the ZeRO stage.

    weights.safetensors     every parameter in training, as the optimizer keeps it (float32, if it keeps such masters)
    optimizer.safetensors   AdamW's two moments of each, `<name>.exp_avg` and `<name>.exp_avg_sq`
    policy.json             version, steps of the optimizer, the learning-rate schedule and its factor

DeepSpeed's own checkpoints are bound to the ranks and the stage that wrote them.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class PolicyState:
    """A version of the policy in host memory, apart from the engine that goes on."""

    version: int
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    num_optimizer_steps: int
    schedule: dict[str, Any]
    learning_rate_factor: float = 1.0
    """What the schedule's learning rates are multiplied by."""

    def write(self, folder: Path) -> None:
        save_file(dict(self.weights), folder / "weights.safetensors")
        save_file(dict(self.moments), folder / "optimizer.safetensors")
        facts = {
            "version": self.version,
            "optimizer_steps": self.num_optimizer_steps,
            "schedule": self.schedule,
            "learning_rate_factor": self.learning_rate_factor,
        }
        (folder / "policy.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "PolicyState":
        facts = json.loads((folder / "policy.json").read_text(encoding="utf-8"))
        weights, moments = (load_file(folder / f"{name}.safetensors") for name in ("weights", "optimizer"))
        factor = facts.get("learning_rate_factor", 1.0)  # checkpoints of before it could be lowered have none
        return cls(facts["version"], weights, moments, facts["optimizer_steps"], facts["schedule"], factor)


def collect(engine: Any, parameters: Mapping[str, Tensor], version: int, keep: bool) -> PolicyState | None:
    """The state, on the rank that is to `keep` it; every rank is called, for each shard is on one of them."""
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    _link(engine)
    for name, parameter in parameters.items():
        master, both = _master(parameter), [_moment(engine, parameter, moment) for moment in _MOMENTS]
        if keep:
            weights[name] = _host(master)
            moments |= {f"{name}.{moment}": _host(value) for moment, value in zip(_MOMENTS, both, strict=True)}
    if not keep:
        return None
    return PolicyState(version, weights, moments, _num_steps(engine), _plain(engine.lr_scheduler.state_dict()))


def restore(engine: Any, parameters: Mapping[str, Tensor], state: PolicyState) -> None:
    """The engine goes on from `state`; every rank is called with all of it.

    ValueError when the state is not of these parameters.
    """
    expected = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
    saved = {name: tuple(value.shape) for name, value in state.weights.items()}
    if differing := sorted(name for name in {*expected, *saved} if expected.get(name) != saved.get(name)):
        raise ValueError(
            f"the checkpoint's policy is another model: {len(differing)} parameters differ, such as {differing[0]} "
            f"({saved.get(differing[0])} there, {expected.get(differing[0])} here)"
        )
    _link(engine)
    for name, parameter in parameters.items():
        _set_master(parameter, state.weights[name])
        for moment in _MOMENTS:
            _set_moment(engine, parameter, moment, state.moments[f"{name}.{moment}"])
    _set_num_steps(engine, state.num_optimizer_steps)
    engine.lr_scheduler.load_state_dict(state.schedule)
    for group, learning_rate in zip(engine.optimizer.param_groups, engine.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = learning_rate


def _is_sharded(parameter: Tensor) -> bool:
    """Whether DeepSpeed keeps master and moments apart from the parameter (ZeRO, bf16)."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")


def _master(parameter: Tensor) -> Tensor:
    if not _is_sharded(parameter):
        return parameter.detach()
    from deepspeed.utils import safe_get_full_fp32_param

    master: Tensor = safe_get_full_fp32_param(parameter)
    return master


def _moment(engine: Any, parameter: Tensor, moment: str) -> Tensor:
    if not _is_sharded(parameter):
        value: Tensor = engine.optimizer.state[parameter][moment]
        return value
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


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Of a scheduler's state what JSON can hold; its functions are made anew from the recipe."""
    return {name: value for name, value in state.items() if name != "lr_lambdas"} | {
        "lr_lambdas": [None] * len(state.get("lr_lambdas", []))
    }


def _host(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()
