"""The gradient of a step is that of the loss over the whole batch, however its sequences are packed and dealt out.

The policy here is a real model and the real packed forward pass, without processes: what a rank would compute, in turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.data.preferences import JudgementStream, PairStream, mismatched
from actors.errors import RunError
from actors.model.forward import PACKED_ATTENTION, row_logprobs
from actors.model.tiny import byte_tokenizer, make_tiny_model
from actors.policy_calls import ReferenceSums
from actors.recipe.model import TinyModel
from actors.recipe.preference import CpoRecipe, DpoRecipe, KtoRecipe, OrpoRecipe, RewardRecipe
from actors.run.preference import Judging, Pairing
from actors.run.references import FILE, References
from algorithms.corrections import sequence_sum
from algorithms.costs import SequenceCosts
from algorithms.packed import pack_row
from algorithms.preference.batch import Judged, Pairs
from algorithms.preference.kto import kl_estimate, kto_loss
from algorithms.preference.weigh import pair_loss, weighted_sum
from algorithms.types import Batch, Group, KlSums, Rollout, Update
from tests.actors.data.test_prompts import ListRows

BYTES = byte_tokenizer(256)
ROWS = tuple(
    {"prompt": "ab" * n, "chosen": "x" * (9 - n), "rejected": "y" * n + "z", "completion": "w" * n, "label": n % 2 > 0}
    for n in range(1, 9)
)


@dataclass
class LocalPolicy:
    """What the ranks of a policy group do, one after another."""

    model: Any
    num_ranks: int
    asked: int = 0
    """Sequences whose log-probability was asked for."""
    steps: list[Batch] = field(default_factory=list)
    below: Any = None
    costs: SequenceCosts = field(default_factory=SequenceCosts)

    @property
    def num_teams(self) -> int:
        return self.num_ranks

    def _micro_batches(self, batch: Batch, groups: Sequence[Group]) -> Any:
        for rank in batch.ranks:
            for micro in rank:
                rollouts = [groups[sample.group].rollouts[sample.rollout] for sample in micro.samples]
                yield micro, pack_row(rollouts, [sample.advantage for sample in micro.samples], pad_id=0)

    async def numbers(self, batch: Batch, groups: Sequence[Group]) -> dict[tuple[int, int], float]:
        found = {}
        for micro, row in self._micro_batches(batch, groups):
            with torch.no_grad():
                sums = sequence_sum(row_logprobs(self.model, row, 1.0)[0].double(), row.sequence_N, len(micro.samples))
            found |= {(s.group, s.rollout): value for s, value in zip(micro.samples, sums.tolist(), strict=True)}
        self.asked += len(found)
        return found

    async def references(self, batch: Batch, groups: Sequence[Group]) -> dict[tuple[int, int], ReferenceSums]:
        """Of the model below, which these tests give one."""
        above, self.model = self.model, self.below
        found = await self.numbers(batch, groups)
        self.model = above
        return {place: ReferenceSums(number, KlSums()) for place, number in found.items()}

    async def step(self, batch: Batch, groups: Sequence[Group]) -> Update:
        self.model.zero_grad()
        for _, row in self._micro_batches(batch, groups):
            weighted_sum(*row_logprobs(self.model, row, 1.0), row.advantages_N)[0].backward()
        self.steps.append(batch)
        return Update(batch.version, batch.version + 1, {"loss": 0.0})

    def gradient(self) -> Tensor:
        return torch.cat([parameter.grad.flatten() for parameter in self.model.parameters()])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    make_tiny_model(TinyModel(kind="tiny", hidden_size=64, num_layers=1, num_heads=2), path, seed=0)
    return path


def never() -> bool:
    """Nobody asks the run to end."""
    return False


def model_of(folder: Path, change: float = 0.0) -> Any:
    """The tiny model, and with `change` one that has moved away from it."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=PACKED_ATTENTION)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(change * torch.randn(parameter.shape, generator=random))
    return model


def recipe_of(kind: type, max_tokens: int = 64, **algorithm: Any) -> Any:
    names = {DpoRecipe: "dpo", KtoRecipe: "kto", OrpoRecipe: "orpo", CpoRecipe: "cpo", RewardRecipe: "reward"}
    values = {"kind": names[kind], "name": "x", "steps": 4, "batch_size": 4, "max_length": 60, "algorithm": algorithm}
    policy = {"max_tokens_per_micro_batch": max_tokens}
    return kind(**values, model={"kind": "tiny"}, dataset={"path": "x.jsonl"}, policy=policy)


def sums(model: Any, rollouts: Sequence[Rollout]) -> Tensor:
    """Each sequence alone."""
    values = [row_logprobs(model, pack_row([rollout], [0.0], 0), 1.0)[0].double().sum() for rollout in rollouts]
    return torch.stack(values)


def gradient_of(loss: Tensor, model: Any) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


PAIRS = {
    "sigmoid": (DpoRecipe, {}),
    "over the whole batch": (DpoRecipe, {"loss_type": ["aot"]}),
    "summed": (DpoRecipe, {"loss_type": ["ipo", "sft"], "loss_weights": (1.0, 0.5)}),
    "simpo": (CpoRecipe, {"loss_type": "simpo", "cpo_alpha": 0.3}),
}
SPLITS = pytest.mark.parametrize(("num_ranks", "max_tokens"), [(1, 8192), (2, 24), (3, 16)])


@SPLITS
@pytest.mark.parametrize(("kind", "algorithm"), PAIRS.values(), ids=PAIRS)
async def test_the_gradient_of_pairs_is_that_of_the_whole_batch(
    folder: Path, tmp_path: Path, kind: type, algorithm: dict[str, Any], num_ranks: int, max_tokens: int
) -> None:
    recipe = recipe_of(kind, max_tokens, **algorithm)
    recipe = recipe.model_copy(
        update={"policy": recipe.policy.model_copy(update={"max_tokens_per_micro_batch": max_tokens})}
    )
    stream = PairStream(ListRows(ROWS), BYTES, 3, True, 60)
    policy: Any = LocalPolicy(model_of(folder), num_ranks)
    lesson = Pairing(recipe, stream, policy, References(policy, tmp_path, max_tokens, print))
    await lesson.prepare(range(4), never)
    policy.model = model_of(folder, change=0.02)
    update, num_tokens = await lesson.step(2)

    pairs = [stream.pair(ordinal) for ordinal in range(8, 12)]
    chosen, rejected = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    model, reference = model_of(folder, change=0.02), model_of(folder)
    with torch.no_grad():
        references = (sums(reference, chosen), sums(reference, rejected)) if kind is DpoRecipe else (None, None)
    tokens = [torch.tensor([rollout.num_loss_tokens for rollout in side]) for side in (chosen, rejected)]
    loss = pair_loss(Pairs(sums(model, chosen), sums(model, rejected), *tokens, *references), recipe.algorithm)
    expected = gradient_of(loss, model)
    assert update.metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert torch.allclose(policy.gradient(), expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-3)
    assert num_tokens == sum(rollout.num_loss_tokens for rollout in chosen + rejected)
    assert expected.abs().max() > 1e-4


@SPLITS
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
async def test_the_gradient_of_judgements_is_that_of_the_whole_batch(
    folder: Path, tmp_path: Path, loss_type: str, num_ranks: int, max_tokens: int
) -> None:
    recipe = recipe_of(KtoRecipe, max_tokens, loss_type=loss_type, undesirable_weight=1.4)
    recipe = recipe.model_copy(
        update={"policy": recipe.policy.model_copy(update={"max_tokens_per_micro_batch": max_tokens})}
    )
    stream = JudgementStream(ListRows(ROWS), BYTES, 3, True, 60)
    policy: Any = LocalPolicy(model_of(folder), num_ranks)
    lesson = Judging(recipe, stream, policy, References(policy, tmp_path, max_tokens, print))
    await lesson.prepare(range(4), never)
    policy.model = model_of(folder, change=0.02)
    update, num_tokens = await lesson.step(1)

    judgements = [stream.judgement(ordinal) for ordinal in range(4, 8)]
    examples = [judgement.example for judgement in judgements]
    others = [mismatched(examples[n], examples[n - 1], 60) for n in range(4)]
    model, reference = model_of(folder, change=0.02), model_of(folder)
    with torch.no_grad():
        reference_S, kl = sums(reference, examples), kl_estimate(sums(model, others), sums(reference, others))
    good_S = torch.tensor([judgement.good for judgement in judgements])
    loss = kto_loss(Judged(sums(model, examples), reference_S, good_S, kl), recipe.algorithm)
    expected = gradient_of(loss, model)
    assert update.metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert torch.allclose(policy.gradient(), expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-3)
    assert num_tokens == sum(rollout.num_loss_tokens for rollout in examples), "the other completions are not learned"
    assert 0 < good_S.sum() < 4


async def test_what_was_computed_of_the_reference_is_kept(folder: Path, tmp_path: Path) -> None:
    """Once for each sequence, however often it comes again, and never again after a restart."""
    recipe, stream = recipe_of(DpoRecipe), PairStream(ListRows(ROWS), BYTES, 3, True, 60)
    policy: Any = LocalPolicy(model_of(folder), 1)
    lesson = Pairing(recipe, stream, policy, References(policy, tmp_path, 64, print))
    await lesson.prepare(range(4), never)  # two epochs
    assert policy.asked == 2 * len(ROWS)
    again: Any = LocalPolicy(model_of(folder, change=0.1), 2)
    resumed = References(again, tmp_path, 64, print)
    await Pairing(recipe, stream, again, resumed).prepare(range(2, 4), never)
    assert again.asked == 0
    for rollout in (stream.pair(5).chosen, stream.pair(5).rejected):
        assert resumed.of(rollout) == lesson.references.of(rollout)
        assert resumed.of(rollout) == pytest.approx(sums(policy.model, [rollout]).item(), abs=1e-4)


@pytest.mark.parametrize("kind", [DpoRecipe, KtoRecipe])
async def test_below_an_adapter_each_step_asks_for_its_own_reference(
    folder: Path, tmp_path: Path, kind: type[DpoRecipe | KtoRecipe]
) -> None:
    """The gradient is that of the numbers computed before the first step, and nothing is kept."""
    recipe: Any = recipe_of(kind)
    gradients = []
    for below in (False, True):
        policy: Any = LocalPolicy(model_of(folder), 2, below=model_of(folder))
        references = References(policy, tmp_path / str(below), 64, print, below=below)
        (tmp_path / str(below)).mkdir()
        rows = ListRows(ROWS)
        lesson: Any = (
            Pairing(recipe, PairStream(rows, BYTES, 3, True, 60), policy, references)
            if kind is DpoRecipe
            else Judging(recipe, JudgementStream(rows, BYTES, 3, True, 60), policy, references)
        )
        await lesson.prepare(range(2), never)
        policy.model = model_of(folder, change=0.1)
        await lesson.step(1)
        gradients.append(policy.gradient())
        assert (tmp_path / str(below) / FILE).exists() != below
    assert gradients[0].abs().max() > 0
    assert torch.allclose(*gradients, atol=1e-6)


async def test_it_goes_on_where_it_was_ended(folder: Path, tmp_path: Path) -> None:
    recipe, stream = recipe_of(DpoRecipe), PairStream(ListRows(ROWS), BYTES, 3, True, 60)
    policy: Any = LocalPolicy(model_of(folder), 1)
    await Pairing(recipe, stream, policy, References(policy, tmp_path, 64, print)).prepare(range(1), never)
    assert policy.asked == 8
    await Pairing(recipe, stream, policy, References(policy, tmp_path, 64, print)).prepare(range(4), never)
    assert policy.asked == 2 * len(ROWS)


async def test_a_run_that_is_asked_to_end_ends_after_one_step_and_keeps_what_was_computed(
    folder: Path, tmp_path: Path
) -> None:
    recipe, stream = recipe_of(DpoRecipe), PairStream(ListRows(ROWS), BYTES, 3, True, 60)
    policy: Any = LocalPolicy(model_of(folder), 1)
    lesson = Pairing(recipe, stream, policy, References(policy, tmp_path, 64, print))
    await lesson.prepare(range(4), lambda: policy.asked > 0)
    assert policy.asked == 2 * recipe.batch_size, "of the first step alone"
    await Pairing(recipe, stream, policy, References(policy, tmp_path, 64, print)).prepare(range(4), never)
    assert policy.asked == 2 * len(ROWS), "nothing is computed twice"


async def test_data_that_have_changed_are_told(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(DpoRecipe)
    for rows in (ROWS, tuple({**row, "chosen": "new"} for row in ROWS)):
        policy: Any = LocalPolicy(model_of(folder), 1)
        stream = PairStream(ListRows(rows), BYTES, 3, True, 60)
        lesson = Pairing(recipe, stream, policy, References(policy, tmp_path, 64, print))
        await lesson.prepare(range(4), never)
    with pytest.raises(RunError, match=r"since it began the data have changed, or .*; put the data back"):
        await lesson.step(0)


async def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"\xff")
    with pytest.raises(RunError, match=r"reference_logprobs.msgpack: .*begin anew with --overwrite"):
        await References(None, tmp_path, 64, print).compute(range(1), lambda step: [], never)  # type: ignore[arg-type]


async def test_a_bad_row_that_comes_up_in_the_run_is_named(folder: Path, tmp_path: Path) -> None:
    rows = ListRows((*ROWS, {"prompt": "a", "chosen": "b", "rejected": "b", "completion": 3, "label": True}))
    policy: Any = LocalPolicy(None, 1)
    references = References(policy, tmp_path, 64, print)
    pairing = Pairing(recipe_of(OrpoRecipe), PairStream(rows, BYTES, 0, False, 60), policy, references)
    judging = Judging(recipe_of(KtoRecipe), JudgementStream(rows, BYTES, 0, False, 60), policy, references)
    for lesson in (pairing, judging):
        with pytest.raises(RunError, match=r"rows.jsonl: row 8: "):
            await lesson.step(2)


async def test_a_loss_that_is_not_finite_reaches_no_weight(folder: Path, tmp_path: Path) -> None:
    class Overflowing(LocalPolicy):
        async def numbers(self, batch: Batch, groups: Sequence[Group]) -> dict[tuple[int, int], float]:
            return dict.fromkeys(await super().numbers(batch, groups), float("nan"))

    policy: Any = Overflowing(model_of(folder), 1)
    references = References(policy, tmp_path, 64, print)
    lesson = Pairing(recipe_of(OrpoRecipe), PairStream(ListRows(ROWS), BYTES, 0, False, 60), policy, references)
    await lesson.step(0)
    advantages = [s.advantage for rank in policy.steps[0].ranks for micro in rank for s in micro.samples]
    assert np.isnan(advantages).all(), "every rank sees that the step is to be skipped"


@pytest.mark.parametrize("padding_is_eos", [False, True])
async def test_a_reward_model_is_scored_where_transformers_looks(
    folder: Path, tmp_path: Path, padding_is_eos: bool
) -> None:
    """The last token of each sequence that is not padding."""
    tokenizer = byte_tokenizer(256)
    if padding_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    seen: list[Rollout] = []

    class Looking(LocalPolicy):
        async def numbers(self, batch: Batch, groups: Sequence[Group]) -> dict[tuple[int, int], float]:
            seen.extend(rollout for group in groups for rollout in group.rollouts)
            return await super().numbers(batch, groups)

    policy: Any = Looking(model_of(folder), 1)
    references = References(policy, tmp_path, 64, print)
    lesson = Pairing(recipe_of(RewardRecipe), PairStream(ListRows(ROWS), tokenizer, 0, False, 60), policy, references)
    await lesson.prepare(range(4), never)
    await lesson.step(0)
    assert len(seen) == 8
    place = 2 if padding_is_eos else 1
    assert all(np.flatnonzero(rollout.loss_mask_T).tolist() == [rollout.num_tokens - place] for rollout in seen)
    assert all(rollout.token_ids_T[-1] == tokenizer.eos_token_id for rollout in seen)
