"""The packed forward pass of student and teacher gives TRL's divergence, and its gradient in every parameter."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig
from trl.experimental.gkd import GKDTrainer

from actors.model.forward import PACKED_ATTENTION, row_divergences
from actors.model.head import put_scoring_head
from actors.model.load import load_causal_lm
from actors.model.segments import segments_of
from actors.model.teacher import load_teacher
from actors.model.team import SOLO
from actors.policy_calls import ModelSource
from algorithms.packed import pack_row
from tests.actors.test_policy import rollouts
from tests.algorithms.full_divergence import generalized_jsd


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_student_and_teacher_on_a_packed_row(tiny_models: dict[str, Path], name: str, beta: float) -> None:
    made = rollouts()
    student = load_causal_lm(str(tiny_models[name]), None, False, "float32", attn_implementation=PACKED_ATTENTION)
    put_scoring_head(student)
    teacher = load_teacher(ModelSource(str(tiny_models["other"])), "float32")
    row = pack_row(made, [0.0] * len(made), 0)
    divergence_N, entropy_N = row_divergences(student, teacher, row, beta, 0.7)
    assert len(divergence_N) == len(entropy_N) == sum(rollout.num_loss_tokens for rollout in made)
    divergence_N.mean().backward()

    plain, other = (
        AutoModelForCausalLM.from_pretrained(tiny_models[which], dtype=torch.float32) for which in (name, "other")
    )
    total = torch.zeros(())
    for rollout in made:
        ids_1T = torch.from_numpy(rollout.token_ids_T.astype("int64"))[None]
        with torch.no_grad():
            teachers_1TV = other(ids_1T).logits[:, :-1]
        labels_1T = torch.where(torch.from_numpy(rollout.loss_mask_T[1:])[None], ids_1T[:, 1:], -100)
        total = total + GKDTrainer.generalized_jsd_loss(
            plain(ids_1T).logits[:, :-1], teachers_1TV, labels_1T, beta, 0.7, num_items_in_batch=len(divergence_N)
        )
    total.backward()
    assert divergence_N.mean().item() == pytest.approx(total.item(), abs=1e-5)
    theirs = {key: parameter.grad for key, parameter in plain.named_parameters()}
    for key, parameter in student.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, theirs[key], rtol=0, atol=1e-5)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_student_and_teacher_whose_logits_are_scaled(dtype: torch.dtype) -> None:
    """Granite divides its logits, Cohere multiplies them: the divergence is that of what the models give."""
    sizes: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    student, teacher = (
        AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION).to(dtype)
        for config in (GraniteConfig(**sizes, logits_scaling=6.0), CohereConfig(**sizes, logit_scale=0.7))
    )
    row = pack_row(
        [replace(each, token_ids_T=each.token_ids_T % 97) for each in rollouts()], [0.0] * len(rollouts()), 0
    )
    inputs = {
        "input_ids": row.token_ids_T[None], "position_ids": row.position_ids_T[None],
        "logits_to_keep": row.predictor_N, "segments": segments_of(row, SOLO), "use_cache": False,
    }  # fmt: skip
    with torch.no_grad():
        full = [model(**inputs).logits[0].double() for model in (student, teacher)]
    assert put_scoring_head(student)
    assert put_scoring_head(teacher)
    with torch.no_grad():
        divergence_N, entropy_N = row_divergences(student, teacher, row, 0.5, 0.7)
    expected_N = generalized_jsd(*full, 0.5, 0.7)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert expected_N.mean() > 0.05
    torch.testing.assert_close(divergence_N.double(), expected_N, rtol=tolerance, atol=tolerance)
    of_student_N = torch.special.entr((full[0] / 0.7).softmax(-1)).sum(-1)
    torch.testing.assert_close(entropy_N.double(), of_student_N, rtol=tolerance, atol=tolerance)
