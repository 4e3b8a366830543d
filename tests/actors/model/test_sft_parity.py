"""Supervised fine-tuning on a packed row is TRL's: its collator, its head and its loss, on the same batch."""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from actors.model.forward import PACKED_ATTENTION, row_logprobs
from actors.model.load import load_causal_lm
from algorithms.losses import sft_loss
from algorithms.packed import pack_row
from algorithms.types import Rollout
from tests.actors.test_policy import rollouts

SPLITS = [(range(8),), (range(3), range(3, 8))]
TOLERANCE = 1e-5
"""docs/algorithms.md states it."""


def trl_loss(path: Path, made: list[Rollout]) -> tuple[torch.Tensor, dict[str, torch.Tensor], float]:
    """The loss of one padding-free batch, its gradient, and the entropy that TRL logs."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    ids = [rollout.token_ids_T.astype(np.int64) for rollout in made]
    learned = [np.where(rollout.loss_mask_T, ids_T, -100) for rollout, ids_T in zip(made, ids, strict=True)]
    batch = collate([{"input_ids": a.tolist(), "labels": b.tolist()} for a, b in zip(ids, learned, strict=True)])
    # Flash attention, with which TRL packs, tells sequences apart by their positions; on the CPU the mask must say it.
    sequence_T = torch.repeat_interleave(
        torch.arange(len(made)), torch.tensor([rollout.num_tokens for rollout in made])
    )
    same_TT = sequence_T[:, None] == sequence_T
    batch["attention_mask"] = same_TT.tril()[None, None]
    metrics = {"train": defaultdict(list)}
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        compute_loss_func=None,
        label_smoother=None,
        args=SimpleNamespace(loss_type="nll", average_tokens_across_devices=False),
        accelerator=SimpleNamespace(parallelism_config=None, gather_for_metrics=lambda tensor: tensor),
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
    )
    loss = SFTTrainer.compute_loss(stand_in, model, batch)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss, gradients, metrics["train"]["entropy"][0]


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_loss_and_gradient_are_trls(tiny_models: dict[str, Path], name: str) -> None:
    """In one row, and as the shares of two micro-batches of the same batch."""
    made = rollouts()
    expected, gradients, entropy = trl_loss(tiny_models[name], made)
    num_tokens = sum(rollout.num_loss_tokens for rollout in made)
    for micro_batches in SPLITS:
        model = load_causal_lm(str(tiny_models[name]), None, False, "float32", attn_implementation=PACKED_ATTENTION)
        total, measured = 0.0, 0.0
        for rows in micro_batches:
            row = pack_row([made[place] for place in rows], [0.0] * len(rows), 0)
            loss, stats = sft_loss(*row_logprobs(model, row, 1.0), num_tokens)
            loss.backward()
            total, measured = total + loss.item(), measured + stats.entropy
        assert total == pytest.approx(expected.item(), abs=TOLERANCE)
        assert measured / num_tokens == pytest.approx(entropy, abs=TOLERANCE)
        assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-2
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=0, atol=TOLERANCE)
