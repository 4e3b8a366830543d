"""A light engine's tokens are a function of the weights that it holds: whoever knows the weights can check each token.

A token depends on the digest of the weights, the seed, and all tokens before it. Rollouts at the same tokens are one
request, so each carries its place among them in its tokens, and the check needs nothing but the rollout itself.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import xxhash
from torch import Tensor

from algorithms.types import Rollout

MAX_RESULTS = 4
"""Rollouts that one request may have."""
_NUM_BYTES = 240 // MAX_RESULTS
_MEAN_LENGTH = 10


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Of the bytes that travel: float32, whatever the policy keeps."""
    state = xxhash.xxh3_64()
    for name in sorted(weights):
        state.update(name.encode())
        state.update(weights[name].detach().to(torch.float32).contiguous().numpy().data)
    return state.hexdigest()


def next_token(digest: str, seed: int, before: Sequence[int], place: int) -> tuple[int, bool]:
    """What rollout `place` of a request samples behind `before`, and whether that ends it."""
    number = xxhash.xxh3_64_intdigest(f"{digest} {seed} {place} {list(before)}".encode())
    return number // _MEAN_LENGTH % _NUM_BYTES * MAX_RESULTS + place, number % _MEAN_LENGTH == 0


def wrong_tokens(rollout: Rollout, digests: Mapping[int, str], seed: int) -> int:
    """How many sampled tokens are not what the weights of their version sample; `digests` are by version."""
    token_ids = rollout.token_ids_T.tolist()
    labelled = dict(_versions(rollout))
    wrong = 0
    for position, token in enumerate(token_ids):
        if rollout.loss_mask_T[position]:
            digest = digests.get(labelled.get(position, -1))
            before, place = token_ids[:position], token % MAX_RESULTS
            wrong += digest is None or next_token(digest, seed, before, place)[0] != token
    return wrong


def text_of(token_ids: Sequence[int]) -> str:
    return bytes(token_ids).decode("latin-1")


def _versions(rollout: Rollout) -> Iterator[tuple[int, int]]:
    for span in rollout.spans:
        for position in range(span.start, span.stop):
            yield position, span.version
