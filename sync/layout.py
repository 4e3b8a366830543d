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
_ALONE = 1 / 4  # of a bucket: a tensor at least as large gets a bucket of its own and can travel without a copy


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

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(placed.parameter.name for placed in self.tensors)

    @property
    def itemsize(self) -> int:
        """The bucket's bytes are whole elements of this size, none of which belongs to two tensors."""
        return min(torch_dtype(placed.parameter.dtype).itemsize for placed in self.tensors)


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
    """Fill buckets in order; a tensor of a fourth of `bucket_bytes` or more gets a bucket of its own."""
    assert len({parameter.name for parameter in parameters}) == len(parameters), "parameter names are unique"
    buckets: list[Bucket] = []
    tensors: list[Placed] = []
    for parameter in parameters:
        offset = _aligned(_end(tensors[-1])) if tensors else 0
        alone = parameter.num_bytes >= _ALONE * bucket_bytes
        if tensors and (alone or offset + parameter.num_bytes > bucket_bytes):
            buckets.append(_bucket(tensors))
            tensors, offset = [], 0
        tensors.append(Placed(parameter, offset))
        if alone:
            buckets.append(_bucket(tensors))
            tensors = []
    if tensors:
        buckets.append(_bucket(tensors))
    return Layout(tuple(buckets))


def whole(bucket: Bucket, tensors: Mapping[str, torch.Tensor], device: torch.device) -> torch.Tensor | None:
    """The bucket's bytes where they already are: its one tensor's own memory, if that is as it travels."""
    if len(bucket.tensors) > 1:
        return None
    parameter = bucket.tensors[0].parameter
    tensor = _checked(parameter, tensors)
    fits = tensor.dtype == torch_dtype(parameter.dtype) and tensor.device == device and tensor.is_contiguous()
    return tensor.reshape(-1).view(torch.uint8) if fits else None


def pack(bucket: Bucket, tensors: Mapping[str, torch.Tensor], buffer: torch.Tensor) -> torch.Tensor:
    """Copy the bucket's tensors into `buffer` (uint8, at least num_bytes), cast to their travel dtype; the bytes."""
    end = 0
    for placed in bucket.tensors:
        buffer[end : placed.offset].zero_()  # padding: the same in every version
        _view(buffer, placed).copy_(_checked(placed.parameter, tensors))
        end = _end(placed)
    return buffer[: bucket.num_bytes]


def unpack(bucket: Bucket, buffer: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The bucket's tensors by name, as views of `buffer`: valid until the buffer is written again."""
    for placed in bucket.tensors:
        yield placed.parameter.name, _view(buffer, placed)


def digest(bucket: Bucket, buffer: torch.Tensor) -> str:
    """XXH3 of the bucket's tensor bytes (padding left out): finds flipped bits and mixed versions, not forgery."""
    state = xxhash.xxh3_64()
    bytes_ = buffer.cpu().numpy().data
    for placed in bucket.tensors:
        state.update(bytes_[placed.offset : _end(placed)])
    return state.hexdigest()


def parameters_of(named: Iterable[tuple[str, torch.Size]], dtype: str) -> list[Parameter]:
    """The parameters that travel, all cast to `dtype`, the one that the replicas hold."""
    return [Parameter(name, dtype, tuple(shape)) for name, shape in named]


def _bucket(tensors: list[Placed]) -> Bucket:
    return Bucket(tuple(tensors), _end(tensors[-1]))


def _end(placed: Placed) -> int:
    return placed.offset + placed.parameter.num_bytes


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _checked(parameter: Parameter, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    tensor = tensors[parameter.name].detach()
    assert tuple(tensor.shape) == parameter.shape, f"{parameter.name}: shape changed since the layout was planned"
    return tensor


def _view(buffer: torch.Tensor, placed: Placed) -> torch.Tensor:
    parameter = placed.parameter
    flat = buffer[placed.offset : _end(placed)]
    return flat.view(torch_dtype(parameter.dtype)).view(parameter.shape)
