"""Divergences from a teacher against TRL's own, and by hand; reverse KL on sampled tokens against TRL's trainer.

Legend: B = rollouts, C = longest completion, V = vocabulary, N = tokens.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from trl.experimental.gkd import GKDTrainer
from trl.experimental.iw_opd import IWOPDTrainer

from tests.algorithms.full_divergence import generalized_jsd
from tests.algorithms.methods.batch import LENGTHS, TEMPERATURE, Drifted, drifted, our_loss
from tests.algorithms.methods.test_parity import DRIFTS, SPLITS, config_of, stated

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


def on_policy(seed: int, drift: float) -> Drifted:
    """Nothing has been learned since the samples, and the rewards are all equal: TRL's IW-OPD knows neither."""
    batch = drifted(seed, drift=drift, stale=False)
    return dataclasses.replace(batch, logits_BCV=batch.start_BCV, rewards=(1.0,) * len(LENGTHS))


def test_on_policy_distillation_is_trls_when_nothing_but_the_teacher_speaks() -> None:
    """The gradient: the loss of r A is another number than that of A log pi, whose gradient is the same at r = 1."""
    config, bound = config_of("on_policy_distillation"), stated("on_policy_distillation", "TRL")
    for seed, drift in enumerate(DRIFTS):
        batch = on_policy(seed, drift)
        _, gradient_BCV = iw_opd_loss(batch)
        assert gradient_BCV.abs().max() > 1e-3
        for micro_batches in SPLITS:
            _, ours_BCV, _ = our_loss(batch, config, micro_batches)
            assert (ours_BCV - gradient_BCV).abs().max() <= bound


def test_with_the_loss_of_cispo_its_value_is_trls_too() -> None:
    config = config_of("on_policy_distillation").model_copy(update={"loss_type": "cispo", "epsilon_high": 5.0})
    batch = on_policy(0, 0.5)
    loss, gradient_BCV = iw_opd_loss(batch)
    ours, ours_BCV, _ = our_loss(batch, config, [range(3), range(3, 8)])
    assert ours == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(ours_BCV, gradient_BCV, rtol=0, atol=1e-12)
