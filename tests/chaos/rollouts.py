"""Rollouts for what only needs them to be of the right form."""

import numpy as np

from algorithms.types import Prompt, Rollout, VersionSpan


def rollout_of(prompt: Prompt, version: int = 9) -> Rollout:
    """Two tokens behind the prompt."""
    num_prompt = len(prompt.token_ids)
    return Rollout(
        token_ids_T=np.array([*prompt.token_ids, 3, 4], np.int32),
        loss_mask_T=np.array([False] * num_prompt + [True] * 2),
        logprobs_T=np.zeros(num_prompt + 2, np.float32),
        spans=(VersionSpan(version, num_prompt, num_prompt + 2),),
        finish_reason="stop",
    )
