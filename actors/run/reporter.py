"""Each step leaves one line of metrics, and every token that was trained is accounted for by its weight version."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import msgspec
from ray.exceptions import RayError

from actors.checkpoint.cut import Progress
from actors.deadline import within
from actors.errors import RunError, last_line
from actors.ledger import Ledger
from actors.pacer import AsyncPacer, ReadyGroup
from actors.publisher import Publisher
from actors.recipe.schema import GrpoRecipe
from actors.run.folder import RunFolder
from actors.run.progress import RunProgress
from actors.run.tracker import Tracker
from algorithms.metrics import reward_metrics
from algorithms.types import Batch, GroupSummary, ScoredGroup, Update, num_trained_tokens

_FETCH_TIMEOUT_S = 60.0


class Reporter:
    """Turns what the components measured into metrics, samples, progress and the summary."""

    def __init__(
        self, recipe: GrpoRecipe, folder: RunFolder, progress: RunProgress, tracker: Tracker,
        pacer: AsyncPacer, publisher: Publisher, ledger: Ledger,
    ) -> None:  # fmt: skip
        self._recipe = recipe
        self._folder = folder
        self._progress = progress
        self._tracker = tracker
        self._pacer = pacer
        self._publisher = publisher
        self._ledger = ledger
        self.metrics: dict[str, float] = {}
        """Of the last step."""
        self._totals = Progress()
        self._waits: dict[str, float] = {}
        self._warned = False
        self._num_quarantined_told = len(ledger.quarantined_groups)
        self._started = self._last = time.monotonic()

    async def report(self, groups: list[ReadyGroup], batch: Batch, update: Update) -> dict[str, float]:
        """One step is done; its metrics."""
        now = time.monotonic()
        step_s, self._last = now - self._last, now
        metrics = self.metrics = self._count(groups, batch, update) | self._speed(groups, step_s)
        self._folder.write_metrics(update.step, metrics)
        self._tracker.log(update.step, metrics)
        self._warn_of_bias()
        self._warn_of_quarantine()
        logging = self._recipe.logging
        if update.step % logging.completions_every == 0 and logging.num_completions:
            await self._write_sample(groups, batch)
        self._progress.step(update.version, _figures(metrics))
        return metrics

    def _count(self, groups: list[ReadyGroup], batch: Batch, update: Update) -> dict[str, float]:
        summaries = [group.summary for group in groups]
        for summary in summaries:
            for note in summary.notes:
                self._progress.say(f"warning: {note}")
            self._totals.num_tokens += sum(summary.num_tokens_G)
            self._totals.unscorable += sum(reward is None for reward in summary.rewards_G)
            for cause, count in summary.failures.items():
                self._totals.reward_failures[cause] = self._totals.reward_failures.get(cause, 0) + count
            if not update.skipped:
                self._count_tokens(summary, batch)
        if not update.skipped:
            self._totals.tokens_trained += num_trained_tokens(batch, summaries)
        rewards = reward_metrics(
            summaries,
            version=batch.version,
            scale_rewards=self._recipe.algorithm.scale_rewards,
            max_staleness=self._recipe.staleness.max_staleness,
        )
        if "reward" in rewards:
            self._totals.rewards.append(rewards["reward"])
        return {
            **rewards,
            **update.metrics,
            **self._publisher.metrics,
            "num_tokens": float(self._totals.num_tokens),
            **self._pacing(),
        }

    def _count_tokens(self, summary: GroupSummary, batch: Batch) -> None:
        """By weight version: fresh ones are within the bound, the others have left the loss."""
        for version, count in summary.tokens_by_version.items():
            if version < batch.oldest_version:
                self._totals.tokens_masked += count
                continue
            self._totals.max_staleness_seen = max(self._totals.max_staleness_seen, batch.version - version)
            self._totals.staleness_sum += count * (batch.version - version)
            self._totals.tokens_fresh += count

    def _pacing(self) -> dict[str, float]:
        """How deep the pipeline is, what was sampled in vain, and whether that tilts what is trained."""
        ledger, pacer = self._ledger, self._pacer
        metrics = {
            "groups/trained": float(ledger.num_trained),
            "groups/in_flight": float(pacer.num_in_flight),
            "groups/ready": float(pacer.num_ready),
            "groups/depth": float(pacer.pipeline_depth),
            "groups/redispatched": float(ledger.num_redispatched),
            "groups/resumed": float(ledger.num_resumed),
            "groups/quarantined": float(ledger.num_quarantined),
            "rollout/replicas": float(self._publisher.fleet.num_serving),
        }
        for cause, waste in ledger.waste.items():
            metrics |= {f"waste/{cause}/{unit}": float(amount) for unit, amount in asdict(waste).items()}
        return metrics | ledger.audit.metrics()

    def _warn_of_bias(self) -> None:
        """Once: what is trained differs from what is sampled, and the recipe can change that."""
        warning = None if self._warned else self._ledger.audit.warning()
        if warning is not None:
            self._warned = True
            self._progress.say(f"warning: {warning}")

    def _warn_of_quarantine(self) -> None:
        """What was set aside since the last step; `python -m deploy ledger` lists it all."""
        found = self._ledger.quarantined_groups[self._num_quarantined_told :]
        self._num_quarantined_told += len(found)
        for quarantined in found:
            self._progress.say(f"warning: row {quarantined.row} is set aside: {quarantined.cause}")

    def _speed(self, groups: list[ReadyGroup], step_s: float) -> dict[str, float]:
        waits = {name: seconds - self._waits.get(name, 0.0) for name, seconds in self._pacer.waits.items()}
        self._waits = dict(self._pacer.waits)
        sampled = sum(sum(group.summary.tokens_by_version.values()) for group in groups)
        return {
            "step_time": step_s,
            "rollout_tok_per_s": sampled / step_s,
            "time/generate_s": _mean([group.summary.generate_s for group in groups]),
            "time/score_s": _mean([group.summary.score_s for group in groups]),
            **{f"wait/{name}_s": seconds for name, seconds in waits.items()},
        }

    async def _write_sample(self, groups: list[ReadyGroup], batch: Batch) -> None:
        try:
            self._folder.write_completions(batch.version, await self._sample(groups, batch))
        except (RayError, RunError) as error:  # the machine that held them may be gone
            self._progress.say(f"warning: no completions of step {batch.version}: {last_line(error)}")

    async def _sample(self, groups: list[ReadyGroup], batch: Batch) -> list[dict[str, Any]]:
        """The first rollout of the first groups, with what was said, what it earned and which weights said it."""
        advantage = {
            (sample.group, sample.rollout): sample.advantage
            for rank in batch.ranks
            for micro_batch in rank
            for sample in micro_batch.samples
        }
        samples = []
        for index, group in enumerate(groups[: self._recipe.logging.num_completions]):
            scored: ScoredGroup = await within(_FETCH_TIMEOUT_S, group.scored, "fetching a sample of completions")
            rollout = scored.group.rollouts[0]
            samples.append(
                {
                    "step": batch.version,
                    "ordinal": group.slot.ordinal,
                    "prompt": scored.group.prompt.text,
                    "completion": scored.completions[0],
                    **{f"rewards/{name}": scores[0] for name, scores in scored.scores.items()},
                    "reward": scored.rewards_G[0],
                    "advantage": advantage.get((index, 0)),
                    "finish_reason": rollout.finish_reason,
                    "weight_versions": [[span.version, span.start, span.stop] for span in rollout.spans],
                }
            )
        return samples

    def summary(self) -> dict[str, Any]:
        """The figures of the whole run."""
        tenth = max(1, len(self._totals.rewards) // 10)
        first, last = self._totals.rewards[:tenth], self._totals.rewards[-tenth:]
        # Masked tokens are in groups that were trained.
        wasted = sum(waste.tokens for cause, waste in self._ledger.waste.items() if cause != "masked")
        return {
            "steps": self._recipe.steps,
            "steps_skipped": self._ledger.num_skipped,
            "seed": self._recipe.seed,
            "reward_first": _mean(first) if first else None,
            "reward_last": _mean(last) if last else None,
            "max_staleness_seen": self._totals.max_staleness_seen,
            "max_staleness_allowed": self._recipe.staleness.max_staleness,
            "staleness_mean": self._totals.staleness_sum / max(1, self._totals.tokens_fresh),
            "weight_version": self._publisher.committed,
            "groups_trained": self._ledger.num_trained,
            "groups_lost": len(self._ledger.lost()),
            "groups_duplicated": self._ledger.num_duplicated,
            "groups_quarantined": self._ledger.num_quarantined,
            "groups_redispatched": self._ledger.num_redispatched,
            "rollouts_unscorable": self._totals.unscorable,
            "reward_failures": self._totals.reward_failures,
            "rows_bad": self._ledger.num_bad_rows,
            "tokens_generated": self._totals.tokens_fresh + self._totals.tokens_masked + wasted,
            "tokens_trained": self._totals.tokens_trained,
            "waste": {cause: asdict(waste) for cause, waste in self._ledger.waste.items()},
            "selection_bias": self._ledger.audit.warning(),
            "resumed": self._ledger.num_cuts,
            "wall_s": self.progress().wall_s,
        }

    def progress(self) -> Progress:
        """What the summary has counted so far, for a checkpoint."""
        wall_s = self._totals.wall_s + time.monotonic() - self._started
        return msgspec.structs.replace(
            self._totals,
            rewards=list(self._totals.rewards),
            reward_failures=dict(self._totals.reward_failures),
            wall_s=wall_s,
        )

    def resume(self, progress: Progress) -> None:
        """Go on counting from a checkpoint."""
        self._totals = progress


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _figures(metrics: Mapping[str, float]) -> dict[str, str]:
    """What the progress display shows of a step."""
    policy, rollout = (_waited(metrics, side) for side in ("policy", "rollout"))
    return {
        "reward": f"{metrics.get('reward', float('nan')):.3f}",
        "staleness": f"{metrics['staleness/mean']:.2f} (max {metrics['staleness/max']:.0f})",
        "rollout": f"{metrics['rollout_tok_per_s']:.0f} tok/s",
        "policy": f"{metrics['policy_tok_per_s']:.0f} tok/s",
        "idle": f"policy {policy:.0%}, rollouts {rollout:.0%}",
    }


def _waited(metrics: Mapping[str, float], side: str) -> float:
    """Share of the step that this side had nothing to do; booked when it ends, so it may be longer than the step."""
    seconds = sum(value for name, value in metrics.items() if name.startswith(f"wait/{side}/"))
    return min(1.0, seconds / metrics["step_time"])
