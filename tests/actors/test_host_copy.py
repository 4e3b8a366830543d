"""Every target ends as its source, whatever the sizes, types and number of threads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors import host_copy
from actors.host_copy import HostCopies, can_share

DTYPES = torch.float32, torch.bfloat16, torch.uint8


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 40)), max_size=12), st.integers(1, 5))
def test_every_target_ends_as_its_source(sizes: list[tuple[torch.dtype, int]], num_threads: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_copy, "_MIN_BYTES", 1)  # else one thread would do for so little
        copies = HostCopies(num_threads)
        sources = [torch.randint(0, 100, (size, 3)).to(dtype) for dtype, size in sizes]
        targets = [torch.zeros_like(source) for source in sources]
        for target, source in zip(targets, sources, strict=True):
            copies.add(target, source)
        copies.finish()
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target, source)


def test_parts_of_one_tensor_are_copied_by_several_threads() -> None:
    source = torch.arange(3 << 20, dtype=torch.float32).requires_grad_()
    target = torch.zeros(3 << 20)
    copies = HostCopies(4)
    copies.add(target, source)
    copies.finish()
    assert torch.equal(target, source)
    target.zero_()
    copies.finish()
    assert not target.any(), "what was copied is not copied again"


def test_what_is_not_in_one_piece_or_of_one_kind_is_not_shared_out() -> None:
    whole = torch.zeros(4, 4)
    assert can_share(whole, torch.ones(4, 4))
    assert not can_share(whole, torch.ones(4, 4).T[:, :4].T.t())
    assert not can_share(whole, torch.ones(4, 4, dtype=torch.bfloat16))
    assert not can_share(whole, torch.ones(16))
