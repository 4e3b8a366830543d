"""One GRPO run from its recipe to its run folder: build the components, run the controller, write the summary."""

from dataclasses import replace

import ray
from transformers import PreTrainedTokenizerBase

from actors.attempts import Attempts, Limits
from actors.checkpoint.checkpointer import Checkpointer
from actors.checkpoint.resume import Resume
from actors.checkpoint.store import CheckpointStore
from actors.controller import Controller
from actors.data.prompts import PromptStream
from actors.health import Health
from actors.ledger import Ledger
from actors.pacer import AsyncPacer, ReadyGroup
from actors.publisher import Publisher
from actors.recipe.schema import GrpoRecipe
from actors.router import Router
from actors.run.folder import RunFolder
from actors.run.plot import plot_run
from actors.run.progress import RunProgress
from actors.run.reporter import Reporter
from actors.run.signals import on_signal
from actors.run.tracker import Tracker
from actors.workers import ModelSource, Roles, Workers, grpo_workers, score_timeout_s
from algorithms.budgets import RewardBudget
from algorithms.depth import DepthController
from algorithms.pacing import Pacer
from algorithms.slots import Slot
from placement.groups import ReservedPools


async def run_grpo(
    recipe: GrpoRecipe,
    model: ModelSource,
    prompts: PromptStream,
    tokenizer: PreTrainedTokenizerBase,
    pools: ReservedPools,
    folder: RunFolder,
    progress: RunProgress,
    resume: Resume | None = None,
    roles: Roles | None = None,
) -> None:
    """Train, from the beginning or from a cut; raises what stopped the run, after the workers are gone."""
    progress.say("starting the policy, the rollout replicas and the reward workers")
    config = recipe.model_dump(mode="json")
    router = _router(recipe)
    async with grpo_workers(recipe, model, pools, folder.path, router, progress.say, roles or Roles()) as workers:
        publisher = _publisher(recipe, workers)
        pacer = _pacer(recipe)
        async_pacer = AsyncPacer(pacer, stall_timeout_s=2 * _group_timeout_s(recipe))
        first_version = 0
        if resume is not None:
            first_version = resume.cut.version
            await workers.policy.restore(resume.path)
            async_pacer.restore(replace(resume.cut.pacer, batches_left=recipe.steps - first_version), _ready(resume))
        await publisher.connect()
        with (
            _ledger(folder, resume) as ledger,
            Tracker(recipe.logging.wandb_project, recipe.name, folder.path, config) as tracker,
        ):
            reporter = Reporter(recipe, folder, progress, tracker, async_pacer, publisher, ledger)
            if resume is not None:
                reporter.resume(resume.cut.progress)
            health = Health(recipe.health, async_pacer, workers.policy, progress.say)
            checkpointer = Checkpointer(
                store=CheckpointStore(folder.checkpoints, recipe.checkpoint.keep),
                every=recipe.checkpoint.every,
                timeout_s=recipe.checkpoint.timeout_s,
                pacer=async_pacer,
                policy=workers.policy,
                ledger=ledger,
                progress=reporter.progress,
                say=progress.say,
                healthy=health.healthy,
                cut_version=None if resume is None else first_version,
            )
            attempts = Attempts(
                limits=_limits(recipe),
                dynamic_sampling=recipe.algorithm.dynamic_sampling,
                rewards=RewardBudget(recipe.rewards.max_failed_share),
                prompts=prompts,
                pacer=async_pacer,
                router=router,
                fleet=workers.fleet,
                ledger=ledger,
            )
            controller = Controller(
                num_steps=recipe.steps,
                staleness=recipe.staleness,
                algorithm=recipe.algorithm,
                max_tokens_per_micro_batch=recipe.policy.max_tokens_per_micro_batch,
                pacer=async_pacer,
                attempts=attempts,
                fleet=workers.fleet,
                policy=workers.policy,
                publisher=publisher,
                ledger=ledger,
                depth=_depth(recipe, pacer),
                report=reporter.report,
                health=health.after,
                settled=checkpointer.after,
                stopped=checkpointer.last,
                first_version=first_version,
            )
            with on_signal(async_pacer.stop, progress.say):
                await controller.run()
            await checkpointer.finish()
        await workers.policy.save(folder.model)
    tokenizer.save_pretrained(folder.model)
    plot_run(folder.read_metrics(), recipe.staleness.max_staleness, folder.plot)
    folder.write_summary(reporter.summary() | {"checkpoint_stall_s": checkpointer.stall_s})


def _ledger(folder: RunFolder, resume: Resume | None) -> Ledger:
    if resume is None:
        return Ledger(folder.ledger)
    return Ledger.resume(folder.ledger, resume.cut.lines, resume.cut.version)


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
        max_in_flight=recipe.max_groups_in_flight,
    )


def _depth(recipe: GrpoRecipe, pacer: Pacer) -> DepthController | None:
    """From one batch, which is the least that fills a step, to the depth that the recipe or the bound allows."""
    config = recipe.staleness.adapt_depth
    depth = pacer.pipeline_depth
    return None if config is None else DepthController(config, recipe.groups_per_batch, depth, depth)


def _router(recipe: GrpoRecipe) -> Router:
    return Router(
        max_groups_per_replica=recipe.max_groups_per_replica,
        num_generations=recipe.algorithm.num_generations,
        max_completion_length=recipe.generation.max_completion_length,
    )


def _publisher(recipe: GrpoRecipe, workers: Workers) -> Publisher:
    return Publisher(
        policy=workers.policy,
        fleet=workers.fleet,
        workers_per_replica=max(1, recipe.pools.rollout.gpus_per_worker),
        dtype=recipe.rollout.dtype,
        config=recipe.sync,
        member_timeout_s=recipe.rollout.start_timeout_s,
        drain_timeout_s=0.0 if recipe.staleness.in_flight_updates else recipe.generation.timeout_s,
    )


def _limits(recipe: GrpoRecipe) -> Limits:
    return Limits(
        group_timeout_s=_group_timeout_s(recipe),
        max_attempts=recipe.rollout.max_attempts,
        max_quarantined=recipe.rollout.max_quarantined,
        max_bad_rows=recipe.dataset.max_bad_rows,
    )


def _group_timeout_s(recipe: GrpoRecipe) -> float:
    """Longer than the deadlines that the replica itself keeps, which name the cause better."""
    return 60.0 + recipe.generation.timeout_s + score_timeout_s(recipe)
