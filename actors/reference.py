"""The reference never changes: it gives the log-probabilities that the KL penalty is measured against."""

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import ray
import torch

from actors.policy import CONTROL
from algorithms.packed import pack_row
from algorithms.packing import pack
from algorithms.types import Group, Rollout
from placement.home import check_home


@dataclass(frozen=True, slots=True)
class ReferenceSettings:
    """All that a reference worker needs to know."""

    model_path: str
    revision: str | None
    trust_remote_code: bool
    dtype: Literal["float32", "bfloat16"]
    temperature: float
    max_tokens: int
    """Token budget of one forward pass."""
    use_gpu: bool


class ReferenceActor:
    """One frozen copy of the initial policy."""

    def __init__(self, settings: ReferenceSettings) -> None:
        self.settings = settings
        self.model: Any = None

    @ray.method(concurrency_group=CONTROL)
    def ping(self) -> int:
        """The process answers, with its number, whatever it computes."""
        return os.getpid()

    def start(self) -> None:
        """Load the model; `score` does so after Ray has started the process again."""
        from actors.model.forward import PACKED_ATTENTION
        from actors.model.head import put_scoring_head
        from actors.model.load import load_causal_lm

        check_home()
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        settings = self.settings
        model: Any = load_causal_lm(
            settings.model_path,
            settings.revision,
            settings.trust_remote_code,
            dtype=settings.dtype,
            attn_implementation=PACKED_ATTENTION,
        )
        put_scoring_head(model)
        self.device = torch.device("cuda" if settings.use_gpu else "cpu")
        self.model = model.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def score(self, group: Group) -> Group:
        """The group with the reference log-probabilities of every loss token filled in."""
        from actors.model.forward import row_logprobs

        if self.model is None:
            self.start()
        scored: dict[int, Rollout] = {}
        lengths = [rollout.num_tokens for rollout in group.rollouts]
        (micro_batches,) = pack(lengths, num_ranks=1, max_tokens=self.settings.max_tokens)
        for indices in micro_batches:
            rollouts = [group.rollouts[index] for index in indices]
            row = pack_row(rollouts, [0.0] * len(rollouts), pad_id=0).to(self.device)
            logprobs_N, _ = row_logprobs(self.model, row, self.settings.temperature)
            for place, (index, rollout) in enumerate(zip(indices, rollouts, strict=True)):
                scored[index] = _with_reference(rollout, logprobs_N[row.sequence_N == place])
        return dataclasses.replace(group, rollouts=tuple(scored[index] for index in range(len(scored))))


def reference_actor() -> Any:
    """The class to make reference workers of; its concurrency group can be given to Ray at no later moment."""
    remote: Any = ray.remote
    return remote(concurrency_groups={CONTROL: 1})(ReferenceActor)


def _with_reference(rollout: Rollout, logprobs_L: torch.Tensor) -> Rollout:
    """The rollout with the reference log-probabilities of its L loss tokens."""
    reference_T = np.zeros(rollout.num_tokens, np.float32)
    reference_T[rollout.loss_mask_T] = logprobs_L.float().cpu().numpy()
    return dataclasses.replace(rollout, reference_logprobs_T=reference_T)
