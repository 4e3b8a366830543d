"""A team's attention is what DeepSpeed's own class for Ulysses makes of the same attention, on real ranks over gloo."""

import os
import socket
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context

import pytest
import torch

from tests.prove import ONLY_PROVE

HEADS, KV_HEADS, SIZE, LENGTHS = 4, 2, 8, (5, 9, 2)


def attend(rank: int, size: int, port: int) -> list[torch.Tensor]:
    """Attended tokens of the whole row, by DeepSpeed's class and by ours."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    from actors.model.forward import packed_attention
    from actors.model.segments import Alone
    from actors.model.team import Team

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False, timeout=timedelta(seconds=60))
    team = Team.join(rank, size, size, timedelta(seconds=60))
    torch.manual_seed(0)
    total = sum(LENGTHS)
    query, key, value = (torch.randn(1, heads, total, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    pieces = tuple((place,) for place in range(len(LENGTHS)))
    alone, together = (Alone(LENGTHS, pieces, pieces, (0,) * len(LENGTHS), each) for each in (Team(), team))
    theirs = UlyssesSPAttentionHF(
        attn=packed_attention, batch_size=1, attn_head_count=HEADS, attn_head_size=SIZE, kv_head_count=KV_HEADS,
        num_hidden_layers=1, process_group=team.group, seq_length_is_variable=True,
    )  # fmt: skip
    module = torch.nn.Module()
    module.num_key_value_groups = HEADS // KV_HEADS  # type: ignore[assignment]
    block = slice(rank * total // size, (rank + 1) * total // size)
    parts = (each[:, :, block] for each in (query, key, value))
    found_1CHD, _ = theirs(module, *parts, None, position_ids=positions[:, block], segments=alone)
    ours_1CHD, _ = packed_attention(
        module, *(each[:, :, rank::size] for each in (query, key, value)), None, segments=together
    )
    whole = [torch.empty(1, total, HEADS, SIZE) for _ in range(2)]
    for each, own_1CHD in zip(whole, (found_1CHD, ours_1CHD), strict=True):
        blocks = [torch.empty(1, total // size, HEADS, SIZE) for _ in range(size)]
        torch.distributed.all_gather(blocks, own_1CHD.reshape(blocks[0].shape).contiguous())
        each.copy_(torch.cat(blocks, 1) if each is whole[0] else torch.stack(blocks, 2).flatten(1, 2))
    return whole


@ONLY_PROVE
@pytest.mark.cluster
def test_attention_is_that_of_deepspeed() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as ranks:
        for theirs, ours in ranks.map(attend, range(2), [2] * 2, [port] * 2):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
