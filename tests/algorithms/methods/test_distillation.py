"""Divergences from a teacher against TRL's own, and by hand; reverse KL on sampled tokens against TRL's trainer.

Legend: B = rollouts, C = longest completion, V = vocabulary, N = tokens.
"""

from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from trl.experimental.gkd import GKDTrainer
from trl.experimental.iw_opd import IWOPDTrainer

from algorithms.config import GrpoConfig
from algorithms.losses.distillation import generalized_jsd, gkd_mixture
from tests.algorithms.methods.batch import LENGTHS, TEMPERATURE, Drifted, drifted, our_loss

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", BETAS)
def test_the_generalized_jsd_is_trls(beta: float, temperature: float) -> None:
    torch.manual_seed(0)
    student_BCV = (2 * torch.randn(3, 5, 13)).requires_grad_()
    teacher_BCV, labels_BC = 2 * torch.randn(3, 5, 13), torch.randint(-1, 3, (3, 5))
    labels_BC[labels_BC < 0] = -100
    counted_BC = labels_BC != -100
    theirs = GKDTrainer.generalized_jsd_loss(
        student_BCV, teacher_BCV, labels_BC, beta, temperature, num_items_in_batch=counted_BC.sum()
    )
    ours = generalized_jsd(student_BCV[counted_BC], teacher_BCV[counted_BC], beta, temperature).mean()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)
    gradients = [torch.autograd.grad(loss, student_BCV)[0] for loss in (ours, theirs)]
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_the_divergences_by_hand() -> None:
    student, teacher = (0.5, 0.5), (0.9, 0.1)
    tables = torch.tensor([student]).log(), torch.tensor([teacher]).log()
    forward = 0.9 * torch.tensor(0.9 / 0.5).log() + 0.1 * torch.tensor(0.1 / 0.5).log()
    reverse = 0.5 * torch.tensor(0.5 / 0.9).log() + 0.5 * torch.tensor(0.5 / 0.1).log()
    assert generalized_jsd(*tables, 0.0).item() == pytest.approx(forward.item())
    assert generalized_jsd(*tables, 1.0).item() == pytest.approx(reverse.item())
    pairs = [(p, m) for of_one in (student, teacher) for p, m in zip(of_one, (0.7, 0.3), strict=True)]
    jsd = 0.5 * sum(p * torch.tensor(p / m).log() for p, m in pairs)
    assert generalized_jsd(*tables, 0.5).item() == pytest.approx(jsd.item())


@pytest.mark.parametrize("beta", BETAS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(beta: float) -> None:
    logits_NV = torch.randn(4, 9).requires_grad_()
    loss_N = generalized_jsd(logits_NV, logits_NV.detach(), beta)
    assert loss_N.abs().max() < 1e-15
    assert torch.autograd.grad(loss_N.sum(), logits_NV)[0].abs().max() < 1e-15


def test_the_mixture_weighs_the_students_samples_by_lmbda() -> None:
    on_student, on_data = torch.tensor([1.0, 3.0]), torch.tensor([5.0])
    assert [gkd_mixture(on_student, on_data, lmbda).item() for lmbda in (0.0, 0.25, 1.0)] == [5.0, 4.25, 2.0]


def iw_opd_loss(batch: Drifted) -> tuple[float, Tensor]:
    """TRL's importance-weighted on-policy distillation with its weights at 1."""
    longest = max(LENGTHS)
    tables = [torch.zeros(len(LENGTHS), longest) for _ in range(3)]
    ids_BC, teacher_BC, sampled_BC = tables
    labels_BC = torch.full((len(LENGTHS), longest), -100)
    for row, ids in enumerate(batch.completions):
        ids_BC[row, : len(ids)] = torch.tensor(ids, dtype=torch.float64)
        labels_BC[row, : len(ids)] = torch.tensor(ids)
        teacher_BC[row, : len(ids)] = torch.tensor(batch.reference[row])
        sampled_BC[row, : len(ids)] = torch.tensor(batch.sampled[row])
    metrics = {"train": defaultdict(list)}
    trainer = SimpleNamespace(
        temperature=TEMPERATURE,
        iw_opd_gamma=0.0,
        iw_opd_epsilon=1e-8,
        model=SimpleNamespace(training=True),
        _metrics=metrics,
    )
    logits_BCV = batch.logits_BCV.clone().requires_grad_()
    loss = IWOPDTrainer._compute_iw_opd_loss(trainer, logits_BCV, ids_BC.long(), labels_BC, teacher_BC, sampled_BC)
    return loss.item(), torch.autograd.grad(loss, logits_BCV)[0]


def test_on_policy_distillation_is_trls_when_nothing_but_the_teacher_speaks() -> None:
    """Rewards are all equal, so that the advantages are the teacher's alone; TRL knows no stale samples."""
    batch = drifted(0, drift=0.5, stale=False)
    fresh = Drifted(
        batch.completions, batch.start_BCV, batch.start_BCV, batch.sampled, batch.reference, batch.ages, (1.0,) * 8
    )
    config = GrpoConfig(
        beta=1.0,
        kl_penalty="advantage",
        loss_type="cispo",
        epsilon_high=5.0,
        old_logprobs="sampled",
        vllm_importance_sampling_correction=False,
    )
    loss, gradient_BCV = iw_opd_loss(fresh)
    ours, ours_BCV, _ = our_loss(fresh, config, [range(3), range(3, 8)])
    assert gradient_BCV.abs().max() > 1e-2
    assert ours == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(ours_BCV, gradient_BCV, rtol=0, atol=1e-12)
