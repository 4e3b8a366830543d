"""The policy's side of a run without a model: float64 tensors whose update is exact, and a record of what was trained.

The same batches in the same order give the same bits. Every token and every reward that is trained is checked.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from actors.errors import RunError
from actors.policy import CONTROL, IO, PolicyActor
from actors.policy_calls import RankBatch, RankUpdate
from algorithms.stats import LossStats
from algorithms.types import Group, ScoredGroup
from sync.member import Membership
from sync.sender import Sent
from tests.chaos.faults import computes, keep_pace, report, reward_of, strike
from tests.chaos.tokens import weights_digest, wrong_tokens
from tests.chaos.wire import ChaosWire

NUM_LAYERS, SIDE = 6, 40


class LightPolicy(PolicyActor):
    """One rank; with others, all hold the same weights and add up their shares of an update."""

    def start(self, host: str, port: int) -> None:
        strike("policy", "start")
        computes(False)
        torch.set_num_threads(1)
        generator = torch.Generator().manual_seed(self.settings.seed)
        self._parameters = {
            f"layer.{index}": torch.randn((SIDE, SIDE), generator=generator, dtype=torch.float64)
            for index in range(NUM_LAYERS)
        }
        self._digests = {0: weights_digest(self._parameters)}
        self._trained: list[list[int]] = []
        self._seen: Any = None
        if self.settings.num_ranks > 1:
            self._meet(host, port, "gloo")

    def step(self, batch: RankBatch, *groups: ScoredGroup | Group) -> RankUpdate:
        if self.rank != 0:
            return self._step(batch, *groups)
        computes(True)
        update = self._step(batch, *groups)
        computes(False)
        return update

    def _step(self, batch: RankBatch, *groups: ScoredGroup | Group) -> RankUpdate:
        strike("policy", "step")
        keep_pace()
        update = {name: torch.zeros_like(value) for name, value in self._parameters.items()}
        loss = 0.0
        for micro_batch in batch.micro_batches:
            for sample in micro_batch.samples:
                group = groups[sample.group]
                assert isinstance(group, ScoredGroup), "a light policy trains on rollouts alone"
                self._check(group, sample.rollout, batch.oldest_version)
                loss += sample.advantage
                seen = np.bincount(group.group.rollouts[sample.rollout].token_ids_T, minlength=SIDE * SIDE)
                for index, value in enumerate(update.values()):
                    value += torch.from_numpy(seen.reshape(SIDE, SIDE)) * (
                        0.01 * (index + 1) * (sample.advantage + 0.1)
                    )
        ordinals = sorted({group.group.prompt.ordinal for group in groups if isinstance(group, ScoredGroup)})
        ordinals = self._joined(update, ordinals)
        strike("policy", "midstep")
        for name, value in self._parameters.items():
            value.mul_(0.99).add_(update[name])
        self.version += 1
        self._trained.append(ordinals)
        self._digests[self.version] = weights_digest(self._parameters)
        return RankUpdate(self.version, loss, 1.0, 1.0, LossStats().to_dict())

    def _joined(self, update: dict[str, Tensor], ordinals: list[int]) -> list[int]:
        if self.settings.num_ranks == 1:
            return ordinals
        for value in update.values():
            distributed.all_reduce(value)
        everybody: list[Any] = [None] * self.settings.num_ranks
        distributed.all_gather_object(everybody, ordinals)
        return sorted({ordinal for share in everybody for ordinal in share})

    def _check(self, scored: ScoredGroup, index: int, oldest_version: int) -> None:
        """Tokens are those of the weights that they are labelled with, rewards those of the function, or None."""
        rollout, reward = scored.group.rollouts[index], scored.rewards_G[index]
        where = f"step {self.version}, ordinal {scored.group.prompt.ordinal}, rollout {index}"
        if wrong := wrong_tokens(rollout, self._digests, self.settings.seed):
            spans = [(span.version, span.start, span.stop) for span in rollout.spans]
            report(f"tokens {wrong} {where}: replica {scored.group.replica}, spans {spans}")
        if any(not oldest_version <= span.version <= self.version for span in rollout.spans):
            report(f"tokens {rollout.num_loss_tokens} {where}: beyond the bound ({oldest_version})")
        if reward is None and not scored.failures:
            report(f"reward 1 {where}: none, and no failure is counted")
        if reward is not None and reward != reward_of(scored.completions[index]):
            report(f"reward 1 {where}: {reward} where {reward_of(scored.completions[index])} was given")

    # Weights -----------------------------------------------------------------------------------------------------

    def join_weights(self, membership: Membership) -> None:
        strike("policy", "join")
        super().join_weights(membership)

    def send_weights(self) -> Sent:
        strike("policy", "send")
        if self._sender is not None and self._wire is not None and not isinstance(self._sender._group, ChaosWire):
            wire: Any = ChaosWire(self._wire, "policy")
            self._sender._group = wire
        return super().send_weights()

    @contextlib.contextmanager
    def _whole(self, parameters: list[Any]) -> Iterator[None]:
        yield

    # Checkpoints -------------------------------------------------------------------------------------------------

    def snapshot(self) -> None:
        strike("policy", "snapshot")
        weights = {name: value.clone() for name, value in self._parameters.items()}
        self._seen = weights, self.version, [*self._trained], dict(self._digests)

    def write_snapshot(self, folder: Path) -> None:
        strike("policy", "write")
        self._write(folder, *self._seen)

    def restore(self, folder: Path) -> None:
        strike("policy", "restore")
        try:
            weights = load_file(folder / "weights.safetensors")
            facts = json.loads((folder / "policy.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{folder}: {error}") from error
        for name, value in self._parameters.items():
            value.copy_(weights[name])
        self.version, self._trained = facts["version"], facts["trained"]
        self._digests = {int(version): digest for version, digest in facts["digests"].items()}

    def save(self, folder: Path) -> None:
        strike("policy", "save")
        if self.rank == 0:
            folder.mkdir(exist_ok=True)
            self._write(folder, self._parameters, self.version, self._trained, self._digests)

    def _write(self, folder: Path, weights: Any, version: int, trained: list[list[int]], digests: Any) -> None:
        save_file(dict(weights), folder / "weights.safetensors")
        strike("policy", "midwrite")
        facts = {"version": version, "trained": trained, "digests": digests}
        (folder / "policy.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")


def light_policy() -> Any:
    import ray

    remote: Any = ray.remote
    return remote(concurrency_groups={CONTROL: 1, IO: 1})(LightPolicy)
