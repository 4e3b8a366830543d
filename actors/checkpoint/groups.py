"""Scored groups as bytes and back, exactly; nothing is unpickled."""

from typing import Any, get_args

import msgspec
import numpy as np

from algorithms.types import GroupSummary, ScoredGroup


class SavedGroup(msgspec.Struct, frozen=True):
    """A group that waits to be trained, as `actors/pacer.py` holds it."""

    attempt: int
    version: int
    """Of the slot: the group was dispatched at it."""
    resumed: bool
    summary: GroupSummary
    scored: ScoredGroup


def encode(groups: list[SavedGroup]) -> bytes:
    return msgspec.msgpack.encode(groups, enc_hook=_plain)


def decode(data: bytes) -> list[SavedGroup]:
    """msgspec.MsgspecError when these are not such bytes."""
    try:
        return msgspec.msgpack.decode(data, type=list[SavedGroup], dec_hook=_array)
    except AssertionError as error:  # what is always true of a rollout (algorithms/types.py) is not true of this one
        raise msgspec.ValidationError(str(error)) from error


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tobytes()
    raise NotImplementedError(f"a {type(value).__name__} cannot be saved")


def _array(kind: Any, value: Any) -> Any:
    """`kind` is NDArray[dtype]: the bytes are a vector of that dtype."""
    dtype = get_args(get_args(kind)[1])[0]
    return np.frombuffer(value, dtype=dtype).copy()
