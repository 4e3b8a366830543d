"""Losses by hand on two short sequences, and shares that sum to the loss of the batch however it is cut.

Legend: N = loss tokens of the micro-batch, S = its sequences.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms.config import GrpoConfig
from algorithms.losses import Normalizer, grpo_loss, sft_loss
from algorithms.losses.kl import kl_k3
from algorithms.stats import LossStats, merge
from algorithms.types import Batch, MicroBatch, Sample

PLAIN = {"vllm_importance_sampling_correction": False}
SAMPLED = PLAIN | {"old_logprobs": "sampled"}


def loss_of(
    logprobs: Sequence[float],
    advantages: Sequence[float],
    sequence: Sequence[int],
    *,
    sampled: Sequence[float] | None = None,
    reference: Sequence[float] | None = None,
    num_sequences: int | None = None,
    fresh: Sequence[bool] | None = None,
    normalizer: Normalizer,
    **config: Any,
) -> tuple[Tensor, LossStats, Tensor]:
    """The loss, the statistics and the gradient in the log-probabilities."""
    logprobs_N = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    loss, stats = grpo_loss(
        logprobs_N,
        torch.ones(len(logprobs), dtype=torch.float64),
        torch.tensor(logprobs if sampled is None else sampled, dtype=torch.float64),
        None if reference is None else torch.tensor(reference, dtype=torch.float64),
        torch.tensor(advantages, dtype=torch.float64),
        torch.tensor(sequence, dtype=torch.long),
        num_sequences=len(set(sequence)) if num_sequences is None else num_sequences,
        config=GrpoConfig(**config),
        normalizer=normalizer,
        fresh_N=None if fresh is None else torch.tensor(fresh),
    )
    (gradient_N,) = torch.autograd.grad(loss, logprobs_N)
    return loss, stats, gradient_N


COUNTS = Normalizer(num_sequences=4, num_loss_tokens=10, max_completion_length=5, num_micro_batches=2)


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        # Sequence 0 has three tokens of advantage 2, sequence 1 one token of advantage -1; on policy the ratio is 1.
        ("grpo", [-2 / 3 / 4] * 3 + [1 / 4]),
        ("dapo", [-2 / 10] * 3 + [1 / 10]),
        ("dr_grpo", [-2 / 20] * 3 + [1 / 20]),
        ("bnpo", [-2 / 4 / 2] * 3 + [1 / 4 / 2]),
    ],
)
def test_each_loss_type_weighs_tokens_by_its_mean(loss_type: str, expected: list[float]) -> None:
    loss, stats, gradient_N = loss_of(
        [-1, -2, -3, -4], [2, 2, 2, -1], [0, 0, 0, 1], normalizer=COUNTS, loss_type=loss_type, **PLAIN
    )
    assert gradient_N.tolist() == pytest.approx(expected)
    assert loss.item() == pytest.approx(sum(expected))
    assert stats.loss == pytest.approx(loss.item())


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.1, 1.0, -1.1),  # within the range
        (1.5, 1.0, 0.0),  # over it and rewarded: nothing more to gain
        (1.5, -1.0, 1.5),  # over it and punished: must come back
        (0.5, 1.0, -0.5),
        (0.5, -1.0, 0.0),
        (1.25, 1.0, -1.25),  # between the lower range's mirror image and epsilon_high
    ],
)
def test_the_ratio_against_sampled_logprobs_is_clipped(ratio: float, advantage: float, expected: float) -> None:
    one = Normalizer(1, 1, 1, 1)
    _, stats, gradient_N = loss_of(
        [-1.0], [advantage], [0], sampled=[-1.0 - math.log(ratio)], normalizer=one, epsilon_high=0.28, **SAMPLED
    )
    assert gradient_N.item() == pytest.approx(expected)
    assert stats.low_clipped + stats.high_clipped == (expected == 0.0)


def test_importance_weights_scale_the_policy_term_but_not_the_kl() -> None:
    one, ratio = Normalizer(1, 1, 1, 1), 1.5
    arguments: dict[str, Any] = {"sampled": [-1.0 - math.log(ratio)], "reference": [-1.4], "normalizer": one}
    weighted, _, _ = loss_of([-1.0], [2.0], [0], beta=0.1, **arguments)
    plain, stats, _ = loss_of([-1.0], [2.0], [0], beta=0.1, **PLAIN, **arguments)
    kl = math.exp(-0.4) + 0.4 - 1
    assert weighted.item() == pytest.approx(-2.0 * ratio + 0.1 * kl)
    assert plain.item() == pytest.approx(-2.0 + 0.1 * kl)
    assert stats.finish()["kl"] == pytest.approx(kl)


def test_the_kl_of_stale_samples_takes_the_ratio_when_unbiased() -> None:
    one, kl = Normalizer(1, 1, 1, 1), math.exp(-0.4) + 0.4 - 1
    for unbiased, factor in ((True, 1.5), (False, 1.0)):
        loss, _, _ = loss_of(
            [-1.0],
            [0.0],
            [0],
            sampled=[-1.0 - math.log(1.5)],
            reference=[-1.4],
            normalizer=one,
            beta=1.0,
            use_bias_correction_kl=unbiased,
            **SAMPLED,
        )
        assert loss.item() == pytest.approx(factor * kl)


@pytest.mark.parametrize("config", [{}, SAMPLED])
def test_an_unknown_sampled_logprob_is_not_corrected_for(config: dict[str, Any]) -> None:
    loss, stats, gradient_N = loss_of(
        [-1.0, -2.0], [3.0, 3.0], [0, 1], sampled=[math.nan, -2.0], normalizer=Normalizer(2, 2, 2, 1), **config
    )
    assert gradient_N.tolist() == pytest.approx([-1.5, -1.5])
    assert stats.num_sampled_tokens == 1
    assert all(math.isfinite(value) for value in stats.finish().values())
    assert loss.item() == pytest.approx(-3.0)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo"])
def test_an_empty_micro_batch_is_zero_on_the_graph(loss_type: str) -> None:
    weight = torch.ones(3, requires_grad=True)
    empty = torch.zeros(0)
    loss, stats = grpo_loss(
        weight[:0] * 2,
        empty,
        empty,
        empty,
        empty,
        torch.zeros(0, dtype=torch.long),
        num_sequences=0,
        config=GrpoConfig(loss_type=loss_type, beta=0.1),
        normalizer=Normalizer(0, 0, 4, 0),
    )
    loss.backward()
    assert loss.item() == 0.0
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.0] * 3
    assert stats == LossStats()
    assert stats.finish() == {}


def test_a_policy_that_yields_nan_shows_in_the_loss() -> None:
    loss, _, _ = loss_of([math.nan, -1.0], [1.0, 1.0], [0, 0], sampled=[-1.0, -1.0], normalizer=COUNTS)
    assert loss.isnan()


@st.composite
def cut_batches(draw: st.DrawFn) -> tuple[list[list[tuple[float, float, float]]], list[int]]:
    """Sequences of (log-probability, sampled, reference) tokens, and the micro-batch that each belongs to."""
    token = st.tuples(*(st.floats(-3.0, -0.1),) * 3)
    sequences = draw(st.lists(st.lists(token, min_size=1, max_size=5), min_size=1, max_size=6))
    return sequences, draw(st.lists(st.integers(0, 3), min_size=len(sequences), max_size=len(sequences)))


@settings(max_examples=60, deadline=None)
@given(
    cut_batches(),
    st.sampled_from(["grpo", "dapo", "dr_grpo"]),
    st.sampled_from(["sampled", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]),
)
def test_shares_and_statistics_do_not_depend_on_the_cut(
    batch: tuple[list[list[tuple[float, float, float]]], list[int]], loss_type: str, correction: str
) -> None:
    sequences, cut = batch
    counts = Normalizer(len(sequences), sum(map(len, sequences)), 5, 4)
    config: dict[str, Any] = SAMPLED if correction == "sampled" else {"vllm_importance_sampling_mode": correction}

    def part(numbers: Sequence[int]) -> tuple[float, LossStats]:
        tokens = [token for number in numbers for token in sequences[number]]
        loss, stats, _ = loss_of(
            [token[0] for token in tokens],
            [(-1.0) ** number * (number + 1) for number in numbers for _ in sequences[number]],
            [place for place, number in enumerate(numbers) for _ in sequences[number]],
            sampled=[token[1] for token in tokens],
            reference=[token[2] for token in tokens],
            normalizer=counts,
            loss_type=loss_type,
            beta=0.1,
            **config,
        )
        return loss.item(), stats

    whole, whole_stats = part(range(len(sequences)))
    parts = [part([number for number, at in enumerate(cut) if at == micro_batch]) for micro_batch in range(4)]
    assert math.fsum(loss for loss, _ in parts) == pytest.approx(whole, abs=1e-9)
    assert merge(stats for _, stats in parts).finish() == pytest.approx(whole_stats.finish(), abs=1e-9)


CORRECTIONS = ["none", "sampled", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
CLIP_MIN, CLIP_MAX = 0.8, 1.3

STALE: dict[str, Any] = {
    "logprobs": [-1.0, -2.0, -0.5, -3.0, -1.5, -0.7, -0.2, -1.1],
    "sampled": [-1.2, -1.6, -0.9, -2.9, -1.1, -0.7, -2.0, -1.3],
    "reference": [-1.1, -2.5, -0.4, -2.0, -1.5, -0.9, -0.3, -1.0],
    "advantages": [2.0, 2.0, 2.0, -1.0, -1.0, -1.0, 0.5, 1.5],
    "sequence": [0, 0, 0, 1, 1, 1, 2, 3],
    "fresh": [False, True, True, True, False, True, False, True],
}
"""Two sequences of which a token is stale, one that is stale whole, and one that is fresh."""


def correcting(correction: str) -> dict[str, Any]:
    bounds = {"vllm_importance_sampling_clip_min": CLIP_MIN, "vllm_importance_sampling_clip_max": CLIP_MAX}
    named = {"none": PLAIN, "sampled": SAMPLED}
    return named.get(correction) or bounds | {"vllm_importance_sampling_mode": correction}


def loss_with_zeroed_tokens(loss_type: str, correction: str, beta: float) -> tuple[float, list[float]]:
    """The loss and its gradient, token by token, where the loss of each stale token is replaced by 0."""
    logprobs_N = torch.tensor(STALE["logprobs"], dtype=torch.float64, requires_grad=True)
    sampled, fresh, sequence = STALE["sampled"], STALE["fresh"], STALE["sequence"]

    def weight(n: int) -> float:
        if correction in ("none", "sampled"):
            return 1.0
        mates = [m for m in range(8) if sequence[m] == sequence[n] and fresh[m]] if "sequence" in correction else [n]
        ratio = math.exp(sum(STALE["logprobs"][m] - sampled[m] for m in mates))
        if "truncate" in correction:
            return min(max(ratio, CLIP_MIN), CLIP_MAX)
        return ratio if CLIP_MIN <= ratio <= CLIP_MAX else 0.0

    def token_loss(n: int) -> Tensor:
        old = sampled[n] if correction == "sampled" else STALE["logprobs"][n]
        ratio, advantage = (logprobs_N[n] - old).exp(), STALE["advantages"][n]
        kl = kl_k3(logprobs_N[n], torch.tensor(STALE["reference"][n], dtype=torch.float64)) * ratio
        return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) * weight(n) + beta * kl

    divisors = {
        "grpo": [sequence.count(number) * COUNTS.num_sequences for number in sequence],
        "dapo": [COUNTS.num_loss_tokens] * 8,
        "dr_grpo": [COUNTS.num_sequences * COUNTS.max_completion_length] * 8,
        "bnpo": [8 * COUNTS.num_micro_batches] * 8,
    }
    terms = [token_loss(n) / divisors[loss_type][n] if fresh[n] else logprobs_N[n] * 0 for n in range(8)]
    loss = torch.stack(terms).sum()
    return loss.item(), torch.autograd.grad(loss, logprobs_N)[0].tolist()


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo"])
def test_stale_tokens_leave_the_loss_and_the_others_weigh_what_they_did(
    loss_type: str, correction: str, beta: float
) -> None:
    config: dict[str, Any] = correcting(correction) | {"loss_type": loss_type, "beta": beta}
    loss, stats, gradient_N = loss_of(**STALE, normalizer=COUNTS, **config)
    expected, expected_N = loss_with_zeroed_tokens(loss_type, correction, beta)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert gradient_N.tolist() == pytest.approx(expected_N, abs=1e-12)
    assert [gradient for gradient, fresh in zip(gradient_N.tolist(), STALE["fresh"], strict=True) if not fresh] == [
        0
    ] * 3
    assert gradient_N.any()
    assert stats.loss == pytest.approx(expected)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_what_stale_tokens_hold_does_not_matter(correction: str) -> None:
    config: dict[str, Any] = correcting(correction) | {"loss_type": "grpo", "beta": 0.3, "normalizer": COUNTS}
    expected, expected_stats, expected_N = loss_of(**STALE, **config)
    for poison in (math.nan, math.inf, -math.inf, 1e30):
        names = ("logprobs", "sampled", "reference", "advantages")
        poisoned = STALE | {
            name: [value if fresh else poison for value, fresh in zip(STALE[name], STALE["fresh"], strict=True)]
            for name in names
        }
        loss, stats, gradient_N = loss_of(**poisoned, **config)
        assert loss.item() == expected.item()
        assert stats == expected_stats
        assert gradient_N.tolist() == expected_N.tolist()


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_the_statistics_are_those_of_the_fresh_tokens_alone(correction: str) -> None:
    config: dict[str, Any] = correcting(correction) | {"beta": 0.3, "normalizer": COUNTS}
    _, stats, _ = loss_of(**STALE, **config)
    kept = [n for n in range(8) if STALE["fresh"][n]]
    alone = {name: [values[n] for n in kept] for name, values in STALE.items() if name not in ("fresh", "sequence")}
    _, expected, _ = loss_of(**alone, sequence=[0, 0, 1, 1, 2], **config)
    assert stats.finish() == pytest.approx(expected.finish())
    assert stats.num_tokens == 5


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo"])
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_nothing_changes_when_all_are_fresh(loss_type: str, correction: str) -> None:
    config: dict[str, Any] = correcting(correction) | {"loss_type": loss_type, "beta": 0.3, "normalizer": COUNTS}
    loss, stats, gradient_N = loss_of(**(STALE | {"fresh": [True] * 8}), **config)
    plain, plain_stats, plain_N = loss_of(**(STALE | {"fresh": None}), **config)
    assert (loss.item(), stats, gradient_N.tolist()) == (plain.item(), plain_stats, plain_N.tolist())


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo"])
def test_a_micro_batch_that_is_stale_whole_is_zero_on_the_graph(loss_type: str) -> None:
    stale = STALE | {"fresh": [False] * 8, "logprobs": [math.nan] * 8}
    loss, stats, gradient_N = loss_of(**stale, normalizer=COUNTS, loss_type=loss_type, beta=0.3)
    assert loss.item() == 0.0
    assert stats == LossStats()
    assert gradient_N.tolist() == [0.0] * 8


def test_k3_is_never_negative_and_zero_on_agreement() -> None:
    logprobs_N = -torch.linspace(0.01, 4, 50)
    reference_N = logprobs_N.flip(0)
    assert (kl_k3(logprobs_N, reference_N) > 0).all()
    assert not kl_k3(logprobs_N, logprobs_N).any()


def test_sft_loss_is_a_share_of_the_mean_over_the_global_batch() -> None:
    logprobs_N = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, stats = sft_loss(logprobs_N, torch.tensor([0.5, 1.5]), num_loss_tokens=6)
    loss.backward()
    assert loss.item() == pytest.approx(0.5)
    assert logprobs_N.grad is not None
    assert logprobs_N.grad.tolist() == pytest.approx([-1 / 6, -1 / 6])
    assert stats.finish() == {"entropy": 1.0}


def test_sft_loss_of_nothing_is_zero_on_the_graph() -> None:
    weight = torch.ones(2, requires_grad=True)
    loss, stats = sft_loss(weight[:0], torch.zeros(0), num_loss_tokens=6)
    loss.backward()
    assert loss.item() == 0.0
    assert stats.finish() == {}
    assert weight.grad is not None


def test_normalizer_of_a_batch_counts_what_is_trained() -> None:
    micro_batch = MicroBatch((Sample(0, 0, 7, 1.0),))
    batch = Batch(
        version=3,
        ranks=((micro_batch, micro_batch), (micro_batch, MicroBatch(()))),
        num_sequences=4,
        num_loss_tokens=9,
        oldest_version=0,
    )
    assert Normalizer.of(batch, 12) == Normalizer(4, 9, 12, 3)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize(
    "method",
    [
        {"importance_sampling_level": "sequence_product", "loss_type": "grpo"},
        {"importance_sampling_level": "sequence", "loss_type": "grpo"},
        {"importance_sampling_level": "token"},
        {"geometric_mask_range": (0.9, 1.1)},
    ],
    ids=str,
)
def test_a_ratio_without_measure_leaves_the_gradient_a_number(method: dict[str, Any], advantage: float) -> None:
    """A thousand tokens that have each grown a little, beside a short rollout whose one token has grown out of all."""
    logprobs_N = torch.tensor([-1.0] * 1000 + [-1.0]).requires_grad_()
    sampled_N = torch.tensor([-1.1] * 1000 + [-200.0])
    loss, _ = grpo_loss(
        logprobs_N,
        torch.ones(1001),
        sampled_N,
        None,
        torch.full((1001,), advantage),
        torch.tensor([0] * 1000 + [1]),
        num_sequences=2,
        config=GrpoConfig(**SAMPLED, **method),
        normalizer=COUNTS,
    )
    (gradient_N,) = torch.autograd.grad(loss, logprobs_N)
    assert loss.isfinite()
    assert gradient_N.isfinite().all()
    if "geometric_mask_range" in method:  # both are far out of range: nothing is left of them
        assert (loss, gradient_N.abs().max()) == (0.0, 0.0)
