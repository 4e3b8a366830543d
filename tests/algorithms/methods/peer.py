"""TRL's own trainers as oracles: their methods run, unbound, on a stand-in that holds only what they read."""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer
from trl.rewards import get_soft_overlong_punishment

from algorithms.config import GrpoConfig
from tests.algorithms.methods.batch import MAX_COMPLETION_LENGTH, TEMPERATURE, Drifted
from tests.algorithms.test_trl_parity import Case, Trl

METHODS = (
    "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "dual_clip", "entropy_bonus", "decoupled_ppo", "truncated_is",
    "icepop", "off_policy_mask",
)  # fmt: skip
"""What TRL has, by the name of the recipe."""


class Peer(Trl):
    """GRPOTrainer on a batch that was sampled by other weights than those that the step began with."""

    def __init__(self, batch: Drifted, config: GrpoConfig) -> None:
        table_BCV = torch.zeros_like(batch.logits_BCV)
        scores = (batch.rewards, (None,) * len(batch.rewards))
        super().__init__(Case(batch.completions, batch.start_BCV, table_BCV, batch.sampled, scores), config)
        self.batch = batch
        self.importance_sampling_level = config.importance_sampling_level
        self.off_policy_mask_threshold = config.off_policy_mask_threshold
        self._entropy_bonus_enabled, self.use_adaptive_entropy = config.entropy_coef > 0, False
        self.entropy_coef = config.entropy_coef
        self.accelerator.sync_gradients = True
        self.args.delta = config.delta
        self.punishment: Any = None
        if config.soft_punish_cache is not None:
            self.punishment = get_soft_overlong_punishment(MAX_COMPLETION_LENGTH, config.soft_punish_cache)

    get_off_policy_mask = staticmethod(GRPOTrainer.get_off_policy_mask)

    def _calculate_rewards(self, *arguments: Any) -> Tensor:
        rewards_BF = super()._calculate_rewards(*arguments)
        if self.punishment is not None:
            completions = [list(ids) for ids in self.batch.completions]
            rewards_BF[:, 0] += torch.tensor(self.punishment(completion_ids=completions))
        return rewards_BF

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor, None]:
        if model is self.ref_model:
            return _padded(self.batch.reference, logits_to_keep), torch.zeros(()), None
        logprobs_BCV = (model.logits_BCV / TEMPERATURE).log_softmax(-1)
        ids_BC1 = input_ids[:, -logits_to_keep:, None]
        return logprobs_BCV.gather(-1, ids_BC1)[..., 0], -(logprobs_BCV.exp() * logprobs_BCV).sum(-1), None


class RlooPeer(Peer):
    """RLOOTrainer on the same."""

    _compute_loss = RLOOTrainer._compute_loss
    _generate_and_score_completions = RLOOTrainer._generate_and_score_completions

    def __init__(self, batch: Drifted, config: GrpoConfig) -> None:
        super().__init__(batch, config)
        self.reward_clip_range, self.normalize_advantages = None, config.normalize_advantages == "rollouts"

    def _generate(self, prompts: list[Any]) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        completions = [list(ids) for ids in self.batch.completions]
        return [[5, 6] for _ in prompts], completions, completions


def trl_loss(batch: Drifted, config: GrpoConfig) -> tuple[float, Tensor, dict[str, float]]:
    """TRL's loss, its gradient in the table of logits, and its metrics."""
    if config.baseline == "leave_one_out":
        peer: Peer = RlooPeer(batch, config)
        inputs = peer.score()
    else:
        peer = Peer(batch, config)
        inputs = peer.score()
        longest = inputs["completion_ids"].size(1)
        inputs["sampling_per_token_logps"] = _padded(batch.sampled, longest)
        old = batch.sampled if config.old_logprobs == "sampled" else batch.start
        inputs["old_per_token_logps"] = _padded(old, longest)
    peer.model = SimpleNamespace(training=True, logits_BCV=batch.logits_BCV.clone().requires_grad_())
    loss = peer._compute_loss(peer.model, inputs)
    (gradient_BCV,) = torch.autograd.grad(loss, peer.model.logits_BCV)
    metrics = {name: value for name, value in peer.metrics.items() if not math.isnan(value)}
    return loss.item(), gradient_BCV, metrics


def _padded(values: Sequence[Sequence[float]], longest: int) -> Tensor:
    table_BC = torch.zeros(len(values), longest)
    for row, of_row in enumerate(values):
        table_BC[row, : len(of_row)] = torch.tensor(of_row)
    return table_BC
