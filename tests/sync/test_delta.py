"""A patch brings any bytes to any others, exactly, and costs little more than the elements that changed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sync.delta import apply, encode, num_changed

DENSITIES = (0.0, 1e-4, 1e-3, 0.01, 0.1, 0.3, 0.7, 1.0)


def changed(num_elements: int, itemsize: int, density: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Random bytes before and after; about `density` of the elements differ, and how many."""
    generator = torch.Generator().manual_seed(seed)
    before = torch.randint(0, 256, (num_elements, itemsize), dtype=torch.uint8, generator=generator)
    differs = torch.rand(num_elements, generator=generator) < density
    after = before.clone()
    # Only the last byte differs: for floats the sign and the exponent, zeros and NaNs included.
    after[differs, -1] ^= torch.randint(1, 256, (int(differs.sum()),), dtype=torch.uint8, generator=generator)
    return before.flatten(), after.flatten(), int(differs.sum())


@given(
    st.integers(0, 5000), st.sampled_from((1, 2, 4)), st.sampled_from(DENSITIES) | st.floats(0.0, 1.0), st.integers(0)
)
def test_a_patch_is_exact_and_can_be_undone(num_elements: int, itemsize: int, density: float, seed: int) -> None:
    before, after, count = changed(num_elements, itemsize, density, seed % 2**63)
    patch = encode(before, after, itemsize)
    assert num_changed(patch) == count
    buffer = before.clone()
    undo = apply(patch, buffer)
    assert torch.equal(buffer, after)
    apply(undo, buffer)
    assert torch.equal(buffer, before)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("density", [0.001, 0.003, 0.01, 0.03, 0.1, 0.3])
def test_a_patch_costs_at_most_a_fifth_more_than_six_bytes_an_element(itemsize: int, density: float) -> None:
    before, after, count = changed(2_000_000, itemsize, density, 1)
    assert encode(before, after, itemsize).numel() <= 1.2 * 6 * count


def test_long_gaps_take_escapes() -> None:
    before = torch.zeros(300_000, dtype=torch.uint8)
    for position in (254, 255, 256, 65534, 65535, 65536, 299_999):
        after = before.clone()
        after[position] = 1
        buffer = before.clone()
        apply(encode(before, after, 1), buffer)
        assert torch.equal(buffer, after)


def test_the_bits_count_not_the_values() -> None:
    before = torch.tensor([0.0, float("nan"), 1.0])
    after = before.clone()
    after[0] = -0.0
    after.view(torch.int32)[1] += 1  # another NaN
    patch = encode(before.view(torch.uint8), after.view(torch.uint8), 4)
    assert num_changed(patch) == 2
    apply(patch, before.view(torch.uint8))
    assert torch.equal(before.view(torch.int32), after.view(torch.int32))


@given(st.integers(0, 2**62), st.integers(0, 255))
def test_a_damaged_patch_never_writes_outside_the_buffer(place: int, byte: int) -> None:
    before, after, _ = changed(500, 2, 0.1, 3)
    patch = encode(before, after, 2)
    patch[place % patch.numel()] = byte
    buffer = before.clone()
    try:
        apply(patch, buffer)
    except ValueError:
        assert torch.equal(buffer, before)


def test_a_patch_of_another_model_is_refused() -> None:
    before, after, _ = changed(500, 2, 0.5, 4)
    with pytest.raises(ValueError, match="damaged"):
        apply(encode(before, after, 2), torch.zeros(10, dtype=torch.uint8))
    with pytest.raises(ValueError, match="damaged"):
        apply(torch.zeros(3, dtype=torch.uint8), torch.zeros(10, dtype=torch.uint8))
