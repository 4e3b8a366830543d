"""Every recipe that learns from data alone does so: its own data, its own lesson, and what a rank computes.

The ranks are the policy's own code without DeepSpeed and without processes; the whole run is in
tests/deploy/test_offline.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from actors.data.dataset import load_rows
from actors.model.forward import PACKED_ATTENTION
from actors.model.load import disable_dropout, load_causal_lm, load_scorer
from actors.model.tiny import byte_tokenizer, make_tiny_model
from actors.policy import PolicyActor
from actors.policy_calls import RankBatch
from actors.policy_group import _renumbered
from actors.recipe.file import load_recipe
from actors.run.lessons import lesson_of
from actors.settings import ModelSource, policy_settings
from algorithms.costs import SequenceCosts
from algorithms.losses import Normalizer
from algorithms.types import Batch, Group, Update
from deploy.columns import example_stream, needed_columns

METHODS = {
    "dpo": "rewards/margins",
    "ipo": "rewards/margins",
    "kto": "rewards/margins",
    "orpo": "log_odds_chosen",
    "cpo": "rewards/margins",
    "simpo": "rewards/margins",
    "reward": "margin",
    "sft_chat": None,
}
"""What each is to make larger."""


class Engine(nn.Module):
    """What ranks ask of DeepSpeed's engine to compute a loss."""

    device = torch.device("cpu")

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


@dataclass
class LocalRanks:
    """Two ranks that share one model: their gradients sum in it."""

    ranks: Sequence[PolicyActor]
    optimizer: torch.optim.Optimizer
    costs: SequenceCosts = field(default_factory=SequenceCosts)

    @property
    def num_teams(self) -> int:
        return len(self.ranks)

    def _shares(self, batch: Batch, groups: Sequence[Group]) -> Iterator[tuple[PolicyActor, RankBatch, list[Group]]]:
        for rank, micro_batches in zip(self.ranks, batch.ranks, strict=True):
            needed = sorted({sample.group for micro in micro_batches for sample in micro.samples})
            share = RankBatch(_renumbered(micro_batches, needed), Normalizer.of(batch, 128), 0)
            yield rank, share, [groups[index] for index in needed]

    async def numbers(self, batch: Batch, groups: Sequence[Group]) -> dict[tuple[int, int], float]:
        found = {}
        for (rank, share, some), micro_batches in zip(self._shares(batch, groups), batch.ranks, strict=True):
            for micro, numbers in zip(micro_batches, rank.numbers(share, *some), strict=True):
                found |= {(s.group, s.rollout): n for s, n in zip(micro.samples, numbers, strict=True)}
        return found

    async def step(self, batch: Batch, groups: Sequence[Group]) -> Update:
        self.optimizer.zero_grad()
        total = 0.0
        for rank, share, some in self._shares(batch, groups):
            for micro in share.micro_batches:
                row = rank._row(micro, some, 0)
                values_N, entropy_N = rank.settings.objective.values(rank.engine, row, rank._teacher)
                loss, _ = rank.settings.objective.loss(row, values_N, entropy_N, values_N.detach(), share.normalizer)
                loss.backward()
                total += loss.item()
        self.optimizer.step()
        return Update(batch.version, batch.version + 1, {"loss": total, "entropy": 0.0})


@pytest.mark.parametrize("method", METHODS)
async def test_the_loss_falls(tmp_path: Path, method: str) -> None:
    recipe: Any = load_recipe(
        f"recipes/offline/{method}.yaml", ["policy.max_tokens_per_micro_batch=300", "steps=5", "batch_size=8"]
    )
    make_tiny_model(recipe.model, tmp_path / "model", seed=0)
    settings = policy_settings(recipe, ModelSource(str(tmp_path / "model")), tmp_path)
    torch.manual_seed(0)
    load = load_scorer if settings.objective.numbers == "scores" else load_causal_lm
    model = load(str(tmp_path / "model"), None, False, "float32", PACKED_ATTENTION)
    disable_dropout(model)
    ranks = [PolicyActor(number, settings) for number in range(2)]
    for rank in ranks:
        rank.engine, rank.pad_id = Engine(model), 0
    policy: Any = LocalRanks(ranks, torch.optim.AdamW(model.parameters(), lr=2e-3))
    rows = load_rows(recipe.dataset, needed_columns(recipe))
    lesson = lesson_of(recipe, example_stream(recipe, rows, byte_tokenizer(256)), policy, tmp_path, print)
    await lesson.prepare(range(1), lambda: False)
    taken = [(await lesson.step(0))[0].metrics for _ in range(5)]  # the same examples, so that nothing else varies
    assert taken[-1]["loss"] < taken[0]["loss"]
    grows = METHODS[method]
    if grows is not None:
        assert taken[-1][grows] > taken[0][grows]
    if method in ("dpo", "ipo", "kto"):  # before the first step the policy is its reference
        assert abs(taken[0]["rewards/chosen"]) < 1e-5
