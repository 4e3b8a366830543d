"""What is packed is what is unpacked, byte for byte, for any parameters and any bucket size."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sync.layout import Layout, Parameter, digest, pack, plan_layout, unpack

DTYPES = ("float32", "bfloat16", "float16", "uint8")


@st.composite
def parameters(draw: st.DrawFn) -> list[Parameter]:
    shapes = draw(st.lists(st.lists(st.integers(1, 7), max_size=3).map(tuple), min_size=1, max_size=12))
    return [Parameter(f"p{i}", draw(st.sampled_from(DTYPES)), shape) for i, shape in enumerate(shapes)]


@given(parameters(), st.integers(1, 400))
def test_every_tensor_survives_the_trip(params: list[Parameter], bucket_bytes: int) -> None:
    layout = plan_layout(params, bucket_bytes)
    assert [p.parameter for bucket in layout.buckets for p in bucket.tensors] == params
    for bucket in layout.buckets:
        assert bucket.num_bytes <= bucket_bytes + 15 or len(bucket.tensors) == 1
        tensors = {
            p.parameter.name: (torch.randn(p.parameter.shape) * 100).to(getattr(torch, p.parameter.dtype))
            for p in bucket.tensors
        }
        buffer = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
        packed = pack(bucket, tensors, buffer)
        for name, tensor in unpack(bucket, packed.clone()):
            assert torch.equal(tensor, tensors[name])


def test_the_layout_travels_as_json() -> None:
    layout = plan_layout([Parameter("a", "bfloat16", (2, 3)), Parameter("b", "float32", ())], 8)
    assert Layout.from_json(layout.to_json()) == layout


def test_a_flipped_bit_changes_the_digest_and_padding_does_not() -> None:
    layout = plan_layout([Parameter("a", "uint8", (5,)), Parameter("b", "uint8", (5,))], 1024)
    (bucket,) = layout.buckets
    buffer = pack(
        bucket, {"a": torch.arange(5), "b": torch.arange(5)}, torch.zeros(bucket.num_bytes, dtype=torch.uint8)
    )
    before = digest(bucket, buffer)
    buffer[7] = 1  # between a and b
    assert digest(bucket, buffer) == before
    buffer[2] ^= 1
    assert digest(bucket, buffer) != before


def test_the_wire_dtype_is_the_receivers() -> None:
    (bucket,) = plan_layout([Parameter("a", "bfloat16", (3,))], 64).buckets
    master = torch.tensor([1.0, 1 / 3, -2.5])
    buffer = pack(bucket, {"a": master}, torch.zeros(bucket.num_bytes, dtype=torch.uint8))
    ((_, received),) = unpack(bucket, buffer)
    assert torch.equal(received, master.bfloat16())
