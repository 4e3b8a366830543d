"""Memory that a long row takes on each of two ranks that share it out, over that on one rank that has it alone.

Each rank is a process of its own, over gloo; the peak is of its resident memory, forward and backward.
"""

import socket
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context

import numpy as np
import torch

from actors.model.forward import PACKED_ATTENTION, row_logprobs
from actors.model.head import put_scoring_head
from actors.model.team import Team
from algorithms.packed import PackedRow, pack_row
from algorithms.types import Rollout

NUM_TOKENS, NUM_LOSS_TOKENS = 8192, 64
"""Of the long row; its logits are few, so that activations are what is measured."""
_TIMEOUT = timedelta(seconds=120)


def row_of(num_tokens: int) -> PackedRow:
    mask_T = np.arange(num_tokens) >= num_tokens - NUM_LOSS_TOKENS
    tokens_T = np.random.default_rng(0).integers(2, 4096, num_tokens).astype(np.int32)
    return pack_row([Rollout(tokens_T, mask_T, np.zeros(num_tokens, np.float32), (), "stop")], [1.0], pad_id=0)


def peak_bytes(rank: int, size: int, port: int) -> tuple[int, float]:
    """Resident memory of this rank beyond what was there before, at most, and the sum of the log-probabilities."""
    from benchmarks.policy_step import model, peak_of

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size, timeout=_TIMEOUT
    )
    team = Team.join(rank, size, size, _TIMEOUT)
    policy = model()
    policy.set_attn_implementation(PACKED_ATTENTION)
    assert put_scoring_head(policy)

    def run(num_tokens: int) -> float:
        logprobs_N, _ = row_logprobs(policy, row_of(num_tokens), 1.0, team)
        logprobs_N.sum().backward()
        return logprobs_N.sum().item()

    run(2 * NUM_LOSS_TOKENS)  # the gradients' own memory, and the libraries'
    return peak_of(lambda: run(NUM_TOKENS))


def memory_share() -> tuple[float, list[int]]:
    """The heavier of two ranks over one alone, and the bytes of all three."""
    alone, *shared = [*_peaks(1), *_peaks(2)]
    for _, total in shared:
        assert abs(total - alone[1]) < 1e-3 * NUM_LOSS_TOKENS, "they must have computed the same"
    return max(peak for peak, _ in shared) / alone[0], [peak for peak, _ in (alone, *shared)]


def _peaks(size: int) -> list[tuple[int, float]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(size, mp_context=get_context("spawn")) as ranks:
        return list(ranks.map(peak_bytes, range(size), [size] * size, [port] * size))
