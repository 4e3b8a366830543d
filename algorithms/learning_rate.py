"""Whatever transformers would refuse of a schedule is refused before anything starts, without importing it.

The table has, of each schedule of `transformers.get_scheduler` that needs no metrics, the arguments that it takes;
tests/actors/model/test_optimizer.py holds it to transformers' own signatures.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Schedule = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr",
    "cosine_warmup_with_min_lr", "polynomial", "inverse_sqrt", "warmup_stable_decay",
]  # fmt: skip
_Shape = Literal["linear", "cosine", "1-sqrt"]

COUNTS = ("num_decay_steps", "num_stable_steps", "timescale")
"""Arguments that count steps."""
_LR_END = 1e-7
"""Where `polynomial` ends by default."""


@dataclass(frozen=True, slots=True)
class _Value:
    """What an argument may be."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _at_least(least: int) -> _Value:
    return _Value(f"a whole number, at least {least}", lambda v: type(v) is int and v >= least)


_POSITIVE = _Value("a number greater than 0", lambda v: _is_number(v) and v > 0)
_RATE = _Value("a number, at least 0", lambda v: _is_number(v) and v >= 0)
_SHARE = _Value("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1)
_SHAPE = _Value(f"one of {', '.join(map(repr, get_args(_Shape)))}", lambda v: v in get_args(_Shape))
_FLOOR = {"min_lr": _RATE, "min_lr_rate": _SHARE}

ARGUMENTS: Mapping[Schedule, Mapping[str, _Value]] = {
    "constant": {},
    "constant_with_warmup": {},
    "linear": {},
    "cosine": {"num_cycles": _POSITIVE},
    "cosine_with_restarts": {"num_cycles": _at_least(1)},
    "cosine_with_min_lr": {"num_cycles": _POSITIVE, **_FLOOR},
    "cosine_warmup_with_min_lr": {"num_cycles": _POSITIVE, **_FLOOR, "warmup_lr_rate": _SHARE},
    "polynomial": {"lr_end": _RATE, "power": _POSITIVE},
    "inverse_sqrt": {"timescale": _at_least(1)},
    "warmup_stable_decay": {
        "num_decay_steps": _at_least(1), "num_stable_steps": _at_least(0), "warmup_type": _SHAPE, "decay_type": _SHAPE,
        "min_lr_ratio": _SHARE, "num_cycles": _POSITIVE,
    },
}  # fmt: skip


def refusals_of_arguments(schedule: Schedule, arguments: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the arguments, whatever the learning rate and the length of the run."""
    known = ARGUMENTS[schedule]
    for name, value in arguments.items():
        key = f"lr_scheduler_kwargs.{name}"
        if name not in known:
            owners = [repr(other) for other, names in ARGUMENTS.items() if name in names]
            whose = f"; {' and '.join(owners)} {'has' if len(owners) == 1 else 'have'} it" if owners else ""
            takes = f"takes {', '.join(map(repr, known))}" if known else "takes no arguments, leave it out"
            yield f"{key}: lr_scheduler_type {schedule!r} {takes}{whose}"
        elif not known[name].holds(value):
            yield f"{key}: {value!r} is not what it must be; write {known[name].words}"
    if "min_lr" in known and ("min_lr" in arguments) == ("min_lr_rate" in arguments):
        yield (
            f"lr_scheduler_kwargs: lr_scheduler_type {schedule!r} ends at a floor; write either min_lr, a learning "
            "rate, or min_lr_rate, a share of learning_rate"
        )
    if schedule == "warmup_stable_decay" and "num_decay_steps" not in arguments:
        yield (
            "lr_scheduler_kwargs.num_decay_steps: required by lr_scheduler_type 'warmup_stable_decay', but missing; "
            "add it: over how many steps, the last ones of the run, the learning rate falls"
        )


def refusals_of_floors(schedule: Schedule, arguments: Mapping[str, Any], learning_rate: float) -> Iterator[str]:
    """Where the end of a schedule is not below its beginning."""
    end = arguments.get("lr_end", _LR_END)
    if schedule == "polynomial" and end >= learning_rate:
        yield f"lr_scheduler_kwargs.lr_end: {end:g} is not below the learning rate {learning_rate:g}; lower it"
    if (floor := arguments.get("min_lr", 0.0)) > learning_rate:
        yield f"lr_scheduler_kwargs.min_lr: {floor:g} is above the learning rate {learning_rate:g}; lower it"


def refusals_of_lengths(
    schedule: Schedule, arguments: Mapping[str, Any], warmup_steps: int, steps: int
) -> Iterator[str]:
    """What does not fit into a run of so many steps."""
    if schedule == "polynomial" and warmup_steps == steps:
        yield (
            f"warmup_steps: {warmup_steps} are all steps of the run, and lr_scheduler_type 'polynomial' needs one to "
            "decay in; lower it"
        )
    decay = arguments.get("num_decay_steps", 0)
    stable = arguments.get("num_stable_steps", steps - warmup_steps - decay)
    if decay and warmup_steps + decay > steps:
        yield (
            f"lr_scheduler_kwargs.num_decay_steps: {decay} steps of decay and {warmup_steps} of warm-up are more than "
            f"the run's {steps}; lower one of them"
        )
    elif warmup_steps + stable + decay != steps:
        yield (
            f"lr_scheduler_kwargs.num_stable_steps: {stable} steps between {warmup_steps} of warm-up and {decay} of "
            f"decay make {warmup_steps + stable + decay}, but the run has {steps}; write "
            f"{steps - warmup_steps - decay}, or leave it out"
        )


def in_updates(arguments: Mapping[str, Any], updates_per_step: int) -> dict[str, Any]:
    """What is counted in steps, counted in updates of the weights, as schedules do."""
    return {name: value * updates_per_step if name in COUNTS else value for name, value in arguments.items()}
