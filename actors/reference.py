"""The reference never changes: it gives the log-probabilities that the KL penalty is measured against."""

import dataclasses
import os
from dataclasses import dataclass

import numpy as np
import torch

from algorithms.packed import pack_row
from algorithms.types import Group


@dataclass(frozen=True, slots=True)
class ReferenceSettings:
    """All that a reference worker needs to know."""

    model_path: str
    revision: str | None
    trust_remote_code: bool
    dtype: str
    temperature: float
    max_tokens: int
    """Token budget of one forward pass."""
    use_gpu: bool


class ReferenceActor:
    """One frozen copy of the initial policy."""

    def __init__(self, settings: ReferenceSettings) -> None:
        self.settings = settings

    def start(self) -> None:
        from actors.forward import PACKED_ATTENTION
        from actors.model import load_causal_lm

        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        settings = self.settings
        model = load_causal_lm(
            settings.model_path,
            settings.revision,
            settings.trust_remote_code,
            dtype=settings.dtype,
            attn_implementation=PACKED_ATTENTION,
        )
        self.device = torch.device("cuda" if settings.use_gpu else "cpu")
        self.model = model.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def score(self, group: Group) -> Group:
        """The group with the reference log-probabilities of every loss token filled in."""
        from actors.forward import row_logprobs

        rollouts = []
        for rollout in group.rollouts:
            row = pack_row([rollout], [0.0], pad_id=0).to(self.device)
            logprobs_N, _ = row_logprobs(self.model, row, self.settings.temperature)
            reference_T = np.zeros(rollout.num_tokens, np.float32)
            reference_T[rollout.loss_mask_T] = logprobs_N.float().cpu().numpy()
            rollouts.append(dataclasses.replace(rollout, reference_logprobs_T=reference_T))
        return dataclasses.replace(group, rollouts=tuple(rollouts))
