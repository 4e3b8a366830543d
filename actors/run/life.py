"""One life of a run: from its beginning, or from a cut, until the last step, or until the policy is lost.

A run has one life, unless its policy fails. Then another begins at the newest cut, and of the life that is over nothing
is left but the engines and the journal: what happened since the cut happened to weights that are gone.
"""

import asyncio
import contextlib
from dataclasses import dataclass, replace
from typing import Any

import ray
from transformers import PreTrainedTokenizerBase

from actors.attempts import Attempts, Limits
from actors.checkpoint.checkpointer import CRITIC, Checkpointer
from actors.checkpoint.moment import GrpoMoment
from actors.checkpoint.resume import Resume
from actors.checkpoint.store import CheckpointStore
from actors.controller import Controller
from actors.critic_group import CriticGroup
from actors.data.examples import data_examples
from actors.data.prompts import PromptStream
from actors.elastic import capacity_followed
from actors.errors import PolicyLostError, first_cause
from actors.health import Health
from actors.ledger import Ledger
from actors.pacer import AsyncPacer, ReadyGroup
from actors.policy_group import PolicyGroup
from actors.publisher import Publisher
from actors.recipe.critic import CriticConfig
from actors.recipe.deadlines import group_timeout_s, stall_timeout_s
from actors.recipe.schema import GrpoRecipe
from actors.router import Router
from actors.run.folder import RunFolder
from actors.run.progress import RunProgress
from actors.run.reporter import Reporter
from actors.run.tracker import Tracker
from actors.run.watchdog import Watchdog
from actors.turns import turns_followed
from actors.weighing import ByKl, ByPairs, ByRewards, ByTeacher, Weighing
from actors.workers import Learners, Workers
from algorithms.budgets import RewardBudget
from algorithms.depth import DepthController
from algorithms.pacing import Pacer
from algorithms.slots import Slot


@dataclass(frozen=True, slots=True)
class Run:
    """What all lives of a run share."""

    recipe: GrpoRecipe
    prompts: PromptStream
    tokenizer: PreTrainedTokenizerBase
    folder: RunFolder
    progress: RunProgress
    tracker: Tracker
    router: Router
    workers: Workers


@dataclass(frozen=True, slots=True)
class Life:
    """The components of one life, wired."""

    run: Run
    learners: Learners
    publisher: Publisher
    pacer: AsyncPacer
    ledger: Ledger
    reporter: Reporter
    checkpointer: Checkpointer
    controller: Controller
    watchdog: Watchdog

    async def live(self) -> None:
        """Train to the last step; PolicyLostError when the policy is lost on the way."""
        liveness, workers = self.run.recipe.liveness, self.run.workers
        capacity = self.run.recipe.groups_in_flight if workers.elastic is not None else None
        with self.ledger:
            try:
                async with (
                    self.watchdog.watching(),
                    self.learners.watched(liveness),
                    capacity_followed(workers.fleet, self.pacer, capacity),
                    turns_followed(workers.fleet.turns, self.pacer),
                ):
                    await self.publisher.connect()
                    await self.controller.run()
            except BaseException as error:
                # It is the policy that writes; and who presses Ctrl-C twice does not want to wait long.
                hurried = isinstance(first_cause(error), PolicyLostError | asyncio.CancelledError)
                await self.checkpointer.finish(liveness.timeout_s if hurried else None)
                raise
            await self.checkpointer.finish()

    def summary(self) -> dict[str, Any]:
        """The figures of the whole run."""
        workers = self.run.workers
        return self.reporter.summary() | {
            "roll_backs": self.ledger.num_roll_backs,
            "replicas_rebuilt": workers.fleet.num_rebuilt,
            "replicas_joined": workers.fleet.num_joined,
            "replicas_left": workers.fleet.num_left,
            "scorers_restarted": workers.scorers.num_restarted,
        }


async def begin(run: Run, learners: Learners, resume: Resume | None) -> Life:
    """A life from the cut on, or from the first step; the learners have just been started."""
    recipe, folder, policy = run.recipe, run.folder, learners.policy
    ledger = _ledger(folder, resume, recipe.groups_per_batch)
    pacer = _pacer(recipe)
    waiting = AsyncPacer(pacer, stall_timeout_s(recipe))
    version = 0
    if resume is not None:
        version = resume.cut.version
        async with learners.watched(recipe.liveness), run.workers.fleet.computing():
            await policy.restore(resume.path)
            if learners.critic is not None:
                await learners.critic.restore(resume.path / CRITIC)
        waiting.restore(replace(resume.cut.pacer, batches_left=recipe.steps - version), _ready(resume))
    publisher = _publisher(run, policy)
    reporter = Reporter(recipe, folder, run.progress, run.tracker, waiting, publisher, ledger)
    if resume is not None:
        reporter.resume(resume.cut.progress)
    health = Health(recipe.watched_health, waiting, policy, run.progress.say, ledger)
    attempts = _attempts(run, waiting, ledger)
    moment = GrpoMoment(waiting, ledger, attempts, _depth(recipe, pacer), reporter.progress, len(run.prompts.rows))
    if resume is not None:
        await moment.restore(resume.cut)
    checkpointer = _checkpointer(run, learners, moment, reporter, health, None if resume is None else version)
    controller = Controller(
        num_steps=recipe.steps,
        staleness=recipe.staleness,
        algorithm=recipe.algorithm,
        max_tokens_per_micro_batch=recipe.policy.max_tokens_per_micro_batch,
        pacer=waiting,
        attempts=attempts,
        policy=policy,
        critic=_critic(run, learners.critic),
        publisher=publisher,
        ledger=ledger,
        depth=moment.depth,
        report=reporter.report,
        health=health.after,
        settled=checkpointer.after,
        stopped=checkpointer.last,
        first_version=version,
        weighing=_weighing(run, policy),
    )
    watchdog = _watchdog(run, learners, waiting, publisher, checkpointer)
    waiting.on_stall = watchdog.idle
    waiting.there_since = lambda: run.workers.there_since
    return Life(run, learners, publisher, waiting, ledger, reporter, checkpointer, controller, watchdog)


def _critic(run: Run, ranks: PolicyGroup | None) -> CriticGroup | None:
    recipe, pool = run.recipe, run.recipe.pools.critic
    if ranks is None or pool is None:
        return None
    config = recipe.critic or CriticConfig()
    turn = contextlib.nullcontext if pool.colocate_with is None else run.workers.fleet.computing
    return CriticGroup(ranks, recipe.algorithm, recipe.policy.max_tokens_per_micro_batch, config.warmup_steps, turn)


def _attempts(run: Run, pacer: AsyncPacer, ledger: Ledger) -> Attempts:
    recipe = run.recipe
    return Attempts(
        limits=_limits(recipe),
        dynamic_sampling=recipe.algorithm.dynamic_sampling,
        rewards=RewardBudget(recipe.rewards.max_failed_share),
        prompts=run.prompts,
        pacer=pacer,
        router=run.router,
        fleet=run.workers.fleet,
        ledger=ledger,
        keeps_groups=run.workers.elastic is not None,
    )


def _checkpointer(
    run: Run, learners: Learners, moment: GrpoMoment, reporter: Reporter, health: Health, cut_version: int | None
) -> Checkpointer:
    recipe = run.recipe
    return Checkpointer(
        store=CheckpointStore(run.folder.checkpoints, recipe.checkpoint.keep, recipe.checkpoint.best),
        config=recipe.checkpoint,
        num_steps=recipe.steps,
        policy=learners.policy,
        critic=learners.critic,
        turns=run.workers.fleet.turns,
        tokenizer=run.tokenizer,
        moment=moment.take,
        metrics=lambda: reporter.metrics,
        say=run.progress.say,
        healthy=health.healthy,
        cut_version=cut_version,
    )


def _watchdog(
    run: Run, learners: Learners, pacer: AsyncPacer, publisher: Publisher, checkpointer: Checkpointer
) -> Watchdog:
    workers = run.workers
    return Watchdog(
        policies=learners.policy.ranks,
        critics=() if learners.critic is None else learners.critic.ranks,
        references=workers.references,
        rewards=workers.rewards,
        fleet=workers.fleet,
        router=run.router,
        pacer=pacer,
        publisher=publisher,
        path=run.folder.stall,
        then=run.recipe.stall.then,
        say=run.progress.say,
        leave=checkpointer.last,
        starting=lambda: workers.starting,
        restarting=lambda: workers.scorers.gone,
    )


def _ledger(folder: RunFolder, resume: Resume | None, groups_per_batch: int) -> Ledger:
    if resume is not None:
        return Ledger.resume(folder.ledger, resume.cut.lines, resume.cut.version, groups_per_batch)
    if folder.ledger.exists():  # of a life that ended before its first cut
        return Ledger.resume(folder.ledger, 0, 0, groups_per_batch)
    return Ledger.begin(folder.ledger, groups_per_batch)


def _ready(resume: Resume) -> list[ReadyGroup]:
    """The groups that waited to be trained, their tokens in this node's object store."""
    return [
        ReadyGroup(
            Slot(saved.summary.ordinal, saved.attempt, saved.version, saved.resumed),
            saved.summary,
            ray.put(saved.scored),
        )
        for saved in resume.groups
    ]


def _pacer(recipe: GrpoRecipe) -> Pacer:
    staleness = recipe.staleness
    return Pacer(
        groups_per_batch=recipe.groups_per_batch,
        max_staleness=staleness.max_staleness,
        num_batches=recipe.steps,
        when_stale=staleness.when_stale,
        over_sampling=staleness.over_sampling,
        pipeline_depth=recipe.pipeline_depth,
        max_in_flight=recipe.groups_in_flight(recipe.pools.rollout.num_workers),
    )


def _depth(recipe: GrpoRecipe, pacer: Pacer) -> DepthController | None:
    """From one batch, which is the least that fills a step, to the depth that the recipe or the bound allows."""
    config = recipe.staleness.adapt_depth
    depth = pacer.pipeline_depth
    return None if config is None else DepthController(config, recipe.groups_per_batch, depth, depth)


def _publisher(run: Run, policy: PolicyGroup) -> Publisher:
    recipe = run.recipe
    return Publisher(
        policy=policy,
        fleet=run.workers.fleet,
        workers_per_replica=max(1, recipe.pools.rollout.gpus_per_worker),
        dtype=recipe.rollout.dtype,
        config=recipe.sync,
        member_timeout_s=recipe.replica_timeout_s,
        drain_timeout_s=0.0 if recipe.staleness.in_flight_updates else recipe.generation.timeout_s,
    )


def _weighing(run: Run, policy: PolicyGroup) -> Weighing:
    """What a batch's weights depend on besides rewards."""
    recipe = run.recipe
    if recipe.distillation is not None:
        examples = data_examples(recipe, run.prompts.rows, run.tokenizer)
        return ByTeacher(recipe.distillation.lmbda, recipe.groups_per_batch, examples)
    if recipe.online_dpo is not None:
        algorithm = recipe.algorithm
        return ByPairs(policy, recipe.online_dpo, algorithm.beta, algorithm.mask_truncated_completions)
    if recipe.reference_below and recipe.algorithm.sums_the_kl:
        return ByKl(policy)
    return ByRewards()


def _limits(recipe: GrpoRecipe) -> Limits:
    return Limits(
        group_timeout_s=group_timeout_s(recipe),
        start_timeout_s=recipe.replica_timeout_s,
        max_attempts=recipe.rollout.max_attempts,
        max_quarantined=recipe.rollout.max_quarantined,
        max_bad_rows=recipe.dataset.max_bad_rows,
    )
