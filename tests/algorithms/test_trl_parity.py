"""TRL's GRPOTrainer is the oracle: its own methods run, unbound, on a stand-in that holds only what they read.

The model is a table of logits, so that a gradient is compared for every logit. Everything runs in float64, where the
two agree to rounding; a difference in mathematics would show far above the tolerance.

Legend: B = rollouts of the batch, C = longest completion, V = vocabulary, N = loss tokens.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import GRPOTrainer

from algorithms.advantages import advantages
from algorithms.config import GrpoConfig
from algorithms.corrections import importance_weights, log_ratio
from algorithms.logprobs import logprobs_and_entropy
from algorithms.losses import Normalizer, grpo_loss
from algorithms.metrics import reward_metrics
from algorithms.stats import LossStats, merge
from algorithms.types import GroupSummary

VOCABULARY, EOS, PAD = 11, 1, 0
NUM_GENERATIONS, MAX_COMPLETION_LENGTH, TEMPERATURE = 4, 12, 0.7
REWARD_WEIGHTS = (1.0, 0.5)
TOLERANCE = 1e-9
FLOAT32 = 1e-6
"""Tolerance of what TRL rounds to float32 on the way to its metrics."""
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@dataclass(frozen=True)
class Case:
    """One batch of 8 rollouts in 2 groups, ragged, partly truncated, sampled by slightly different weights."""

    completions: tuple[tuple[int, ...], ...]
    logits_BCV: Tensor
    reference_BCV: Tensor
    sampled: tuple[tuple[float | None, ...], ...]
    scores: tuple[tuple[float | None, ...], ...]
    """One row per reward function."""

    @property
    def rewards(self) -> list[float | None]:
        def total(row: Sequence[float | None]) -> float | None:
            known = [score * weight for score, weight in zip(row, REWARD_WEIGHTS, strict=True) if score is not None]
            return sum(known) if known else None

        return [total(row) for row in zip(*self.scores, strict=True)]

    @property
    def grouped_rewards(self) -> list[list[float | None]]:
        rewards = self.rewards
        return [rewards[i : i + NUM_GENERATIONS] for i in range(0, len(rewards), NUM_GENERATIONS)]

    @property
    def truncated(self) -> list[bool]:
        return [ids[-1] != EOS for ids in self.completions]


def make_case(seed: int, *, unknown: bool, unscorable: bool) -> Case:
    """`unknown`: some sampled log-probabilities are missing; `unscorable`: some rewards are."""
    random = torch.Generator().manual_seed(seed)
    lengths = (3, 9, 1, 12, 5, 7, 2, 8)
    completions = [torch.randint(2, VOCABULARY, (length,), generator=random).tolist() for length in lengths]
    for i in (0, 1, 4, 5, 7):
        completions[i][-1] = EOS
    logits_BCV, noise_BCV, reference_BCV = torch.randn(3, len(lengths), max(lengths), VOCABULARY, generator=random)
    sampled_BC = _table_logprobs(logits_BCV + 0.25 * noise_BCV, completions)
    sampled: list[list[float | None]] = [row[:n] for row, n in zip(sampled_BC.tolist(), lengths, strict=True)]
    if unknown:
        sampled[1][3] = sampled[6][0] = sampled[6][1] = None
    scores: list[list[float | None]] = torch.randn(2, len(lengths), generator=random).tolist()
    if unscorable:
        scores[0][1] = scores[1][1] = scores[1][6] = None
    return Case(
        completions=tuple(map(tuple, completions)),
        logits_BCV=logits_BCV,
        reference_BCV=logits_BCV + 0.3 * reference_BCV,
        sampled=tuple(map(tuple, sampled)),
        scores=tuple(map(tuple, scores)),
    )


def _table_logprobs(logits_BCV: Tensor, completions: Sequence[Sequence[int]]) -> Tensor:
    ids_BC = torch.zeros(logits_BCV.shape[:2], dtype=torch.long)
    for row, ids in enumerate(completions):
        ids_BC[row, : len(ids)] = torch.tensor(ids)
    return (logits_BCV / TEMPERATURE).log_softmax(-1).gather(-1, ids_BC[..., None])[..., 0]


class Trl:
    """The attributes that TRL's methods read, and no trainer behind them."""

    _compute_loss = GRPOTrainer._compute_loss
    _generate = GRPOTrainer._generate
    _generate_and_score_completions = GRPOTrainer._generate_and_score_completions

    def __init__(self, case: Case, config: GrpoConfig, num_micro_batches: int = 1) -> None:
        self.case = case
        self.model = SimpleNamespace(
            training=True, is_gradient_checkpointing=False, logits_BCV=case.logits_BCV.clone().requires_grad_()
        )
        self.ref_model = SimpleNamespace(logits_BCV=case.reference_BCV)
        self.accelerator = SimpleNamespace(
            device=torch.device("cpu"),
            process_index=0,
            num_processes=1,
            gather=lambda tensor: tensor,
            reduce=lambda tensor, reduction: tensor,
        )
        self.args = SimpleNamespace(
            per_device_train_batch_size=len(case.completions),
            steps_per_generation=num_micro_batches,
            gradient_accumulation_steps=num_micro_batches,
            gradient_checkpointing_kwargs=None,
            use_bias_correction_kl=config.use_bias_correction_kl,
            delta=None,
        )
        self.current_gradient_accumulation_steps, self.num_iterations = num_micro_batches, 1
        self.num_generations, self.max_completion_length = NUM_GENERATIONS, MAX_COMPLETION_LENGTH
        self.loss_type, self.beta, self.scale_rewards = config.loss_type, config.beta, config.scale_rewards
        self.epsilon_low, self.epsilon_high = config.epsilon, config.epsilon_high or config.epsilon
        self.use_vllm = self.vllm_importance_sampling_correction = config.vllm_importance_sampling_correction
        self.vllm_importance_sampling_mode = config.vllm_importance_sampling_mode
        self.vllm_importance_sampling_clip_min = config.vllm_importance_sampling_clip_min
        self.vllm_importance_sampling_clip_max = config.vllm_importance_sampling_clip_max
        self.mask_truncated_completions = config.mask_truncated_completions
        self.importance_sampling_level, self.multi_objective_aggregation = "token", "sum_then_normalize"
        self.top_entropy_quantile, self.off_policy_mask_threshold = 1.0, None
        self.aux_loss_enabled = self._entropy_bonus_enabled = self.log_multimodal = False
        self.tools, self.environments, self.environment_factories = [], None, None
        self.eos_token_ids, self.pad_to_multiple_of = [EOS], None
        self._tokenizer = SimpleNamespace(pad_token_id=PAD)
        self.processing_class = SimpleNamespace(batch_decode=lambda ids, skip_special_tokens: [str(i) for i in ids])
        self.state, self._last_loaded_step = SimpleNamespace(global_step=0, num_input_tokens_seen=0), 0
        self.reward_funcs, self.reward_func_names = [None, None], ["accuracy", "format"]
        self.reward_weights = torch.tensor(REWARD_WEIGHTS)
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}
        self._logs: dict[str, Any] = {
            "prompt": [],
            "completion": [],
            "rewards": defaultdict(list),
            "advantages": [],
            "extra": defaultdict(list),
        }
        self._pending_extra_logs: dict[str, list[Any]] = {}
        self._pending_metrics: dict[str, list[float]] = {}

    def rollout_func(self, prompts: list[str], _: "Trl") -> dict[str, Any]:
        completions = [list(ids) for ids in self.case.completions]
        return {"prompt_ids": [[5, 6] for _ in prompts], "completion_ids": completions, "logprobs": self.case.sampled}

    def _calculate_rewards(self, *_: Any) -> Tensor:
        return torch.tensor([[math.nan if s is None else s for s in row] for row in self.case.scores]).T.contiguous()

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **_: Any
    ) -> tuple[Tensor, Tensor, None]:
        logprobs_BCV = (model.logits_BCV / TEMPERATURE).log_softmax(-1)
        ids_BC1 = input_ids[:, -logits_to_keep:, None]
        return logprobs_BCV.gather(-1, ids_BC1)[..., 0], -(logprobs_BCV.exp() * logprobs_BCV).sum(-1).detach(), None

    def score(self) -> dict[str, Tensor]:
        return self._generate_and_score_completions([{"prompt": "1+1="} for _ in self.case.completions])

    def loss(self, inputs: dict[str, Tensor], micro_batches: Sequence[Sequence[int]]) -> tuple[float, Tensor]:
        """The sum of TRL's losses over the micro-batches and its gradient in the table of logits."""
        total = torch.zeros(())
        for rows in micro_batches:
            part = {name: value if value.dim() == 0 else value[list(rows)] for name, value in inputs.items()}
            model = SimpleNamespace(logits_BCV=self.model.logits_BCV[list(rows)])
            total = total + self._compute_loss(model, part)
        (gradient_BCV,) = torch.autograd.grad(total, self.model.logits_BCV)
        return total.item(), gradient_BCV

    @property
    def metrics(self) -> dict[str, float]:
        return {name: values[-1] for name, values in self._metrics["train"].items()}


def trl_loss(
    case: Case, config: GrpoConfig, micro_batches: Sequence[Sequence[int]]
) -> tuple[float, Tensor, dict[str, float]]:
    """TRL's loss, gradient and metrics; `sampled` old log-probabilities are handed to it as its old ones."""
    trl = Trl(case, config, len(micro_batches))
    inputs = trl.score()
    inputs.pop("old_per_token_logps", None)
    if config.old_logprobs == "sampled":
        inputs["old_per_token_logps"] = inputs["sampling_per_token_logps"]
    loss, gradient_BCV = trl.loss(inputs, micro_batches)
    return loss, gradient_BCV, trl.metrics


def our_loss(case: Case, config: GrpoConfig, micro_batches: Sequence[Sequence[int]]) -> tuple[float, Tensor, LossStats]:
    """The same from our functions, with flat arrays per micro-batch."""
    logits_BCV = case.logits_BCV.clone().requires_grad_()
    advantages_B = [a for group in advantages(case.grouped_rewards, config.scale_rewards) for a in group]
    kept = [not (config.mask_truncated_completions and cut) for cut in case.truncated]
    normalizer = Normalizer(
        num_sequences=len(case.completions),
        num_loss_tokens=sum(len(ids) for ids, keep in zip(case.completions, kept, strict=True) if keep),
        max_completion_length=MAX_COMPLETION_LENGTH,
        num_micro_batches=sum(bool(rows) for rows in micro_batches),
    )
    total, stats = torch.zeros(()), []
    for rows in ([row for row in rows if kept[row]] for rows in micro_batches):
        share, measured = _our_share(case, logits_BCV, advantages_B, rows, config, normalizer)
        total = total + share
        stats.append(measured)
    (gradient_BCV,) = torch.autograd.grad(total, logits_BCV)
    return total.item(), gradient_BCV, merge(stats)


def _our_share(
    case: Case,
    logits_BCV: Tensor,
    advantages_B: Sequence[float],
    rows: Sequence[int],
    config: GrpoConfig,
    normalizer: Normalizer,
) -> tuple[Tensor, LossStats]:
    lengths = [len(case.completions[row]) for row in rows]
    row_N = torch.tensor(
        [row for row, length in zip(rows, lengths, strict=True) for _ in range(length)], dtype=torch.long
    )
    column_N = torch.tensor([column for length in lengths for column in range(length)], dtype=torch.long)
    targets_N = torch.tensor([token for row in rows for token in case.completions[row]], dtype=torch.long)
    reference_NV = case.reference_BCV[row_N, column_N]
    sampled = [math.nan if value is None else value for row in rows for value in case.sampled[row]]
    return grpo_loss(
        *logprobs_and_entropy(logits_BCV[row_N, column_N], targets_N, TEMPERATURE, chunk_size=4),
        torch.tensor(sampled),
        logprobs_and_entropy(reference_NV, targets_N, TEMPERATURE, chunk_size=5)[0] if config.beta else None,
        torch.tensor(advantages_B)[row_N],
        torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths, dtype=torch.long)),
        num_sequences=len(rows),
        config=config,
        normalizer=normalizer,
    )


WHOLE = (range(8),)
RAGGED = ((0, 5, 2), (7,), (1, 3, 4, 6))


def configs(loss_type: str, correction: str) -> Iterator[GrpoConfig]:
    """Every combination of the KL penalty, its correction and the upper clip range."""
    for beta, unbiased in ((0.0, False), (0.0, True), (0.1, False), (0.1, True)):
        for epsilon_high in (None, 0.28):
            yield GrpoConfig(
                loss_type=loss_type,
                beta=beta,
                use_bias_correction_kl=unbiased,
                epsilon_high=epsilon_high,
                old_logprobs="sampled" if correction == "sampled" else "recomputed",
                vllm_importance_sampling_correction=correction in MODES,
                vllm_importance_sampling_mode=correction if correction in MODES else "sequence_mask",
                vllm_importance_sampling_clip_min=0.6,
                vllm_importance_sampling_clip_max=1.7,
            )


@pytest.mark.parametrize("correction", ["none", "sampled", *MODES])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo"])
def test_loss_and_gradient(loss_type: str, correction: str) -> None:
    case = make_case(7, unknown=correction in MODES, unscorable=True)
    for config in configs(loss_type, correction):
        reference, reference_BCV, _ = trl_loss(case, config, RAGGED if loss_type == "bnpo" else WHOLE)
        splits = [(*RAGGED, ())] if loss_type == "bnpo" else [WHOLE, (*RAGGED, ()), [(i,) for i in range(8)]]
        for micro_batches in splits:
            loss, gradient_BCV, _ = our_loss(case, config, micro_batches)
            assert abs(loss - reference) < TOLERANCE, f"{config} over {micro_batches}"
            assert (gradient_BCV - reference_BCV).abs().max() < TOLERANCE, f"{config} over {micro_batches}"
        assert reference_BCV.abs().max() > 1e-3, "the comparison must not be of zeros"


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo"])
def test_gradient_accumulation(loss_type: str) -> None:
    """Over equal micro-batches TRL's accumulated gradient is ours, for every loss type."""
    case, config = make_case(2, unknown=True, unscorable=False), GrpoConfig(loss_type=loss_type, beta=0.1)
    micro_batches = ((0, 1), (2, 3), (4, 5), (6, 7))
    reference, reference_BCV, _ = trl_loss(case, config, micro_batches)
    loss, gradient_BCV, _ = our_loss(case, config, micro_batches)
    assert abs(loss - reference) < TOLERANCE
    assert (gradient_BCV - reference_BCV).abs().max() < TOLERANCE


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo"])
def test_float32(loss_type: str) -> None:
    torch.set_default_dtype(torch.float32)
    for seed in range(4):
        case, config = make_case(seed, unknown=True, unscorable=True), GrpoConfig(loss_type=loss_type, beta=0.1)
        reference, reference_BCV, _ = trl_loss(case, config, WHOLE)
        loss, gradient_BCV, _ = our_loss(case, config, WHOLE)
        assert gradient_BCV.dtype == torch.float32
        assert abs(loss - reference) < 1e-5
        assert (gradient_BCV - reference_BCV).abs().max() < 1e-5


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo"])
def test_truncated_completions_can_be_masked(loss_type: str) -> None:
    case = make_case(3, unknown=False, unscorable=False)
    config = GrpoConfig(loss_type=loss_type, beta=0.1, mask_truncated_completions=True)
    reference, reference_BCV, _ = trl_loss(case, config, WHOLE)
    loss, gradient_BCV, _ = our_loss(case, config, WHOLE)
    assert abs(loss - reference) < TOLERANCE
    assert (gradient_BCV - reference_BCV).abs().max() < TOLERANCE


@pytest.mark.parametrize("correction", ["none", "sampled", *MODES])
def test_logged_metrics(correction: str) -> None:
    """Whatever name both emit has one value, also when ours is merged from micro-batches."""
    case = make_case(11, unknown=correction in MODES, unscorable=False)
    for config in configs("dapo", correction):
        _, _, theirs = trl_loss(case, config, WHOLE)
        for micro_batches in (WHOLE, RAGGED):
            _, _, stats = our_loss(case, config, micro_batches)
            ours = stats.finish()
            names = {"entropy", *(name for name in theirs if name.startswith(("kl", "clip_ratio/", "sampling/")))}
            assert len(names) == 6 + (config.beta > 0) + 5 * (correction in MODES)
            for name in names:
                assert ours[name] == pytest.approx(theirs[name], abs=FLOAT32), name


@pytest.mark.parametrize("unscorable", [False, True])
@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_advantages_and_reward_metrics(scale_rewards: str, unscorable: bool) -> None:
    config = GrpoConfig(scale_rewards=scale_rewards)
    for seed in range(5):
        case = make_case(seed, unknown=False, unscorable=unscorable)
        _check_rewards(case, config)


def test_advantages_of_groups_without_spread() -> None:
    """Equal rewards, one scorable reward, none at all, and functions that never answer."""
    spread, equal, one, nothing = (0.1, 0.7, 0.2, 0.9), (0.3,) * 4, (None, 0.5, None, None), (None,) * 4
    case = make_case(0, unknown=False, unscorable=False)
    for first in (equal, one, nothing):
        for second in (spread, equal, one, nothing):
            for scale_rewards in ("group", "batch", "none"):
                scores = ((*first, *second), (None,) * 8)
                changed = Case(case.completions, case.logits_BCV, case.reference_BCV, case.sampled, scores)
                _check_rewards(changed, GrpoConfig(scale_rewards=scale_rewards))


def _check_rewards(case: Case, config: GrpoConfig) -> None:
    trl = Trl(case, config)
    theirs = trl.score()["advantages"].tolist()
    ours = [a for group in advantages(case.grouped_rewards, config.scale_rewards) for a in group]
    assert ours == pytest.approx(theirs, abs=TOLERANCE)
    metrics = reward_metrics(_summaries(case), version=3, scale_rewards=config.scale_rewards)
    expected = {
        name: value
        for name, value in trl.metrics.items()
        if name.startswith(("reward", "frac_reward", "completions/")) and not math.isnan(value)
    }
    shared = {name: value for name, value in metrics.items() if not name.startswith(("staleness/", "reward/"))}
    assert shared == pytest.approx(expected, abs=FLOAT32)


def _summaries(case: Case) -> list[GroupSummary]:
    groups = []
    for number, rewards in enumerate(case.grouped_rewards):
        rows = slice(number * NUM_GENERATIONS, (number + 1) * NUM_GENERATIONS)
        lengths = tuple(len(ids) for ids in case.completions[rows])
        scores = dict(zip(("accuracy", "format"), (row[rows] for row in case.scores), strict=True))
        groups.append(
            GroupSummary(
                ordinal=number,
                epoch=0,
                attempt=0,
                replica=0,
                num_tokens_G=tuple(2 + length for length in lengths),
                num_loss_tokens_G=lengths,
                num_prompt_tokens=2,
                truncated_G=tuple(case.truncated[rows]),
                tokens_by_version_G=tuple({1: length} for length in lengths),
                rewards_G=tuple(rewards),
                scores=scores,
                failures={},
                generate_s=0.0,
                score_s=0.0,
            )
        )
    return groups


# TRL cannot truncate without a bound; ours then leaves the ratio as it is.
@pytest.mark.parametrize(
    ("mode", "bounds"),
    [(mode, bounds) for mode in MODES for bounds in ((None, 3.0), (None, 1.7), (0.6, 1.7), (0.9, None))]
    + [(mode, (None, None)) for mode in ("token_mask", "sequence_mask")],
)
def test_importance_weights(mode: Any, bounds: tuple[float | None, float | None]) -> None:
    clip_min, clip_max = bounds
    case = make_case(5, unknown=True, unscorable=False)
    config = GrpoConfig(
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=clip_min,
        vllm_importance_sampling_clip_max=clip_max,
    )
    lengths = [len(ids) for ids in case.completions]
    theirs_BC = Trl(case, config).score()["importance_sampling_ratio"].expand(-1, max(lengths))
    theirs_N = torch.cat([row[:length] for row, length in zip(theirs_BC, lengths, strict=True)])
    logprobs_BC = _table_logprobs(case.logits_BCV, case.completions)
    logprobs_N = torch.cat([row[:length] for row, length in zip(logprobs_BC, lengths, strict=True)])
    sampled_N = torch.tensor([math.nan if value is None else value for row in case.sampled for value in row])
    ours = importance_weights(
        log_ratio(logprobs_N, sampled_N),
        torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        num_sequences=len(lengths),
        mode=mode,
        clip_min=clip_min,
        clip_max=clip_max,
    )
    assert torch.allclose(ours.weights_N, theirs_N, rtol=0, atol=TOLERANCE)
    out_of_range_N = (theirs_N == 0) | (theirs_N == clip_min) | (theirs_N == clip_max)
    assert out_of_range_N.any() == (bounds not in ((None, 3.0), (None, None))) or mode.startswith("sequence")
