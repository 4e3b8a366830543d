"""The packed forward pass of student and teacher gives TRL's divergence, and its gradient in every parameter."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.experimental.gkd import GKDTrainer

from actors.model.forward import PACKED_ATTENTION, row_divergences
from actors.model.head import put_scoring_head
from actors.model.load import load_causal_lm
from actors.model.teacher import load_teacher
from actors.policy_calls import ModelSource
from algorithms.packed import pack_row
from tests.actors.test_policy import rollouts


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
