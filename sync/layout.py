"""Both sides of a publication agree on one layout: which bytes of which bucket are which tensor.

The layout is a pure function of the parameters' names, dtypes and shapes and of the bucket size. It is computed once,
sent ahead as JSON, and stays for the whole run; only bytes and digests travel with a version.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Self

import msgspec
import torch
import xxhash

_ALIGNMENT = 16  # bytes; every dtype can be viewed at a multiple of it


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of the model as it travels: `dtype` is torch's name without the prefix, such as `bfloat16`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * torch_dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Placed:
    """A parameter and its place: bytes [offset, offset + num_bytes) of its bucket."""

    parameter: Parameter
    offset: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors that travel in one broadcast of `num_bytes`."""

    tensors: tuple[Placed, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Every parameter is in exactly one bucket, in the order of the model."""

    buckets: tuple[Bucket, ...]

    @property
    def num_bytes(self) -> int:
        return sum(bucket.num_bytes for bucket in self.buckets)

    def to_json(self) -> str:
        return msgspec.json.encode(asdict(self)).decode()

    @classmethod
    def from_json(cls, text: str) -> Self:
        return msgspec.json.decode(text, type=cls)


def torch_dtype(name: str) -> torch.dtype:
    """`bfloat16` -> torch.bfloat16."""
    dtype = getattr(torch, name, None)
    assert isinstance(dtype, torch.dtype), f"{name} is not a torch dtype"
    return dtype


def plan_layout(parameters: Sequence[Parameter], bucket_bytes: int) -> Layout:
    """Fill buckets in order; a tensor larger than `bucket_bytes` gets a bucket of its own."""
    assert len({parameter.name for parameter in parameters}) == len(parameters), "parameter names are unique"
    buckets: list[Bucket] = []
    tensors: list[Placed] = []
    size = 0
    for parameter in parameters:
        if tensors and size + parameter.num_bytes > bucket_bytes:
            buckets.append(Bucket(tuple(tensors), size))
            tensors, size = [], 0
        tensors.append(Placed(parameter, size))
        size += -(-parameter.num_bytes // _ALIGNMENT) * _ALIGNMENT
    if tensors:
        buckets.append(Bucket(tuple(tensors), size))
    return Layout(tuple(buckets))


def pack(bucket: Bucket, tensors: Mapping[str, torch.Tensor], buffer: torch.Tensor) -> torch.Tensor:
    """Copy the bucket's tensors into `buffer` (uint8, at least num_bytes), cast to their travel dtype; the bytes."""
    for placed in bucket.tensors:
        parameter = placed.parameter
        view = _view(buffer, placed)
        source = tensors[parameter.name]
        assert tuple(source.shape) == parameter.shape, f"{parameter.name}: shape changed since the layout was planned"
        view.copy_(source.detach())
    return buffer[: bucket.num_bytes]


def unpack(bucket: Bucket, buffer: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The bucket's tensors by name, as views of `buffer`: valid until the buffer is written again."""
    for placed in bucket.tensors:
        yield placed.parameter.name, _view(buffer, placed)


def digest(bucket: Bucket, buffer: torch.Tensor) -> str:
    """XXH3 of the bucket's tensor bytes (padding left out): finds flipped bits and mixed versions, not forgery."""
    state = xxhash.xxh3_64()
    for placed in bucket.tensors:
        stop = placed.offset + placed.parameter.num_bytes
        state.update(buffer[placed.offset : stop].numpy().data)
    return state.hexdigest()


def parameters_of(named: Iterable[tuple[str, torch.Size]], dtype: str) -> list[Parameter]:
    """The parameters that travel, all cast to `dtype`, the one that the replicas hold."""
    return [Parameter(name, dtype, tuple(shape)) for name, shape in named]


def _view(buffer: torch.Tensor, placed: Placed) -> torch.Tensor:
    parameter = placed.parameter
    flat = buffer[placed.offset : placed.offset + parameter.num_bytes]
    return flat.view(torch_dtype(parameter.dtype)).view(parameter.shape)
