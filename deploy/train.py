"""`python -m deploy train`: what can be known to be wrong with a recipe is found before anything is started."""

import errno
import os
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ray.exceptions import RayError
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from actors.checkpoint.resume import Resume, changes, find, with_rows
from actors.checkpoint.store import CheckpointStore
from actors.data.dataset import Rows, load_rows, reward_column_names
from actors.data.examples import ExampleStream, data_examples
from actors.data.preferences import JudgementStream, PairStream
from actors.data.prompts import PromptStream
from actors.errors import RunError, first_cause, last_line
from actors.journal import check
from actors.model.files import MODEL
from actors.model.heads import check_heads
from actors.model.kernels import check_kernels
from actors.model.load import load_skeleton, load_tokenizer, max_model_length
from actors.model.lora import target_modules
from actors.model.quantize import check_quantizer, check_whole
from actors.model.template import check_unchanged, with_template
from actors.model.tiny import byte_tokenizer, make_tiny_model, tiny_skeleton
from actors.recipe.base import OfflineRecipe
from actors.recipe.file import load_recipe
from actors.recipe.model import PretrainedModel, RecipeModel, TinyModel
from actors.recipe.pools import fewer_pools, first_pools, used_pools
from actors.recipe.schema import GrpoRecipe, Recipe
from actors.rewards.classifier import check_reward_model
from actors.rewards.functions import check_reward
from actors.run.folder import RunFolder
from actors.run.grpo import run_grpo
from actors.run.lessons import Stream
from actors.run.lineage import trained_before
from actors.run.progress import RunProgress
from actors.run.sft import run_sft
from actors.run.tracker import check_tracker
from actors.settings import ModelSource, source_of
from deploy.columns import example_stream, needed_columns
from deploy.joined import check_cluster
from deploy.session import ClusterError, ray_session
from deploy.stopping import listen, nothing_left, run_to_end
from deploy.trust import trusted_code
from placement.cluster import this_machine
from placement.groups import ReservedPools, Singly, reserve
from placement.live import plan_now
from placement.plan import PlacementError, plan

_RESERVE_TIMEOUT_S = 120.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK = (*_FULL, errno.EROFS, errno.EIO, errno.ESTALE)


@dataclass(frozen=True, slots=True)
class Job:
    """A run that has been checked: nothing that can be known beforehand stands in its way."""

    recipe: Recipe
    rows: Rows
    folder: RunFolder
    overwrite: bool
    resume: Resume | None
    seen: tuple[object, ...]
    """What the folder held when all this was decided."""


def prepare(
    recipe: Recipe, path: str, address: str | None, overwrite: bool, allowed: Collection[str] = ()
) -> list[Job]:
    """The runs that the recipe asks for, in order; ValueError names the key, the file and the fix.

    `path` is where the recipe was read, for messages. Without an `address` the workers must fit on this machine. A run
    that was ended before its time is gone on with; keys in `allowed` may have another value then.
    """
    jobs: list[Job] = []
    for run in [before for _, before in trained_before(recipe, path)] + [recipe]:
        rows = load_rows(run.dataset, needed_columns(run))
        if isinstance(run, GrpoRecipe):
            names = reward_column_names(rows.column_names)
            for reward in run.rewards.functions:
                if reward.model is not None:
                    check_reward_model(reward.model)
                else:
                    check_reward(reward.source, names, max_memory_gb=run.rewards.max_memory_gb)
        if address is None:
            plan(first_pools(run), this_machine())
        check_tracker(run.logging.wandb_project)
        tokenizer, num_positions = words(run)
        stream_of(run, rows, tokenizer, num_positions)
        if isinstance(run, GrpoRecipe) and run.reference is not None:
            _check_reference("reference", run.reference, tokenizer, num_positions)
        if isinstance(run, GrpoRecipe) and run.critic_model is not None:
            _check_reference("critic.model", run.critic_model, tokenizer, num_positions)
        check_kernels(run.policy.liger, run.pools.policy.gpus_per_worker > 0)
        if run.policy.sequence_parallel_size > 1:
            check_heads(_skeleton(run), run.policy.sequence_parallel_size, "policy.sequence_parallel_size")
        if run.policy.lora is not None:
            skeleton = _skeleton(run)
            check_whole(skeleton)
            target_modules(skeleton, run.policy.lora)
            if run.policy.lora.quantize is not None:
                check_quantizer()
        folder = RunFolder(run.folder)
        resume = None if overwrite else _resume(run, folder, allowed)
        if resume is not None:
            resume = with_rows(resume, len(rows), rows.source, allowed)
            check_unchanged(tokenizer, run.model.chat_template, resume.path / MODEL, allowed)
        replaces = overwrite or (resume is None and _ended_early(run, folder))
        if resume is None:
            folder.check_free(replaces)
        jobs.append(Job(run, rows, folder, replaces, resume, _contents(folder)))
    return jobs


def _resume(recipe: Recipe, folder: RunFolder, allowed: Collection[str]) -> Resume | None:
    """Where a run that has not finished can go on from."""
    if folder.finished or not folder.recipe.exists():
        return None
    resume = find(CheckpointStore(folder.checkpoints), folder.recipe, recipe, allowed)
    if resume is not None and isinstance(recipe, GrpoRecipe):
        check(folder.ledger, resume.cut.lines)  # so that one that is damaged is told before anything is started
    if resume is not None and resume.cut.version >= recipe.steps:
        raise ValueError(
            f"steps: {recipe.steps}, but the run in {folder.path} has taken {resume.cut.version}; raise steps, or "
            "begin anew with --overwrite"
        )
    return resume


def _contents(folder: RunFolder) -> tuple[object, ...]:
    """What decides whether a run begins, begins anew or goes on."""
    return folder.finished, folder.recipe.exists(), *CheckpointStore(folder.checkpoints).versions()


def _ended_early(recipe: Recipe, folder: RunFolder) -> bool:
    """Whether the same run was here and ended before its first checkpoint: the same command begins it again."""
    begun = folder.recipe.exists() and not folder.finished
    return begun and not list(changes(folder.recipe, recipe))


def execute(jobs: list[Job], address: str | None, console: Console) -> None:
    """Run the jobs one after another on one Ray; raises what stopped a run, ClusterError before any has begun."""
    disable_progress_bar()  # a line for each file of a model would hide ours
    say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    for warning in trusted_code(job.recipe for job in jobs):
        say(warning)
    with ray_session(address, say):
        listen()
        if address is not None:
            check_cluster([job.recipe for job in jobs])
        for job in jobs:
            _run(job, console, begun=job is not jobs[0])
        nothing_left()


def _run(job: Job, console: Console, begun: bool) -> None:
    with job.folder.held():
        if _contents(job.folder) != job.seen:
            raise RunError(
                f"run_dir: another process has trained in {job.folder.path} meanwhile; give the command again"
            )
        pools = _reserved(job.recipe, begun)
        for stray in pools.strays:
            console.print(f"warning: {stray}", highlight=False, soft_wrap=True, markup=False)
        try:
            _begin(job, console)
            placed = pools.plan.bundles.items()
            job.folder.write_placement({pool: [bundle.node for bundle in bundles] for pool, bundles in placed})
            _train(job, pools, console)
        except (BaseExceptionGroup, OSError, RayError) as errors:
            raise _told(first_cause(errors), job.folder) from None
        finally:
            pools.release()
    _conclude(job.folder, console)


def _reserved(recipe: Recipe, begun: bool) -> ReservedPools:
    """All pools on the live cluster, else nothing is held: ClusterError when it is too small or too busy, RunError when
    an earlier run of the command has begun."""
    try:
        rollout = recipe.pools.rollout
        elastic = isinstance(recipe, GrpoRecipe) and rollout.elastic
        singly = {"rollout": Singly(rollout.least, rollout.num_workers)} if elastic else {}
        return reserve(plan_now(used_pools(recipe), fewer_pools(recipe)), _RESERVE_TIMEOUT_S, singly)
    except PlacementError as error:
        raise (RunError if begun else ClusterError)(f"{recipe.name}: {error}") from None


def _told(error: BaseException, folder: RunFolder) -> BaseException:
    """What stopped the run; a disk that takes no more, or a folder that was taken away, is the user's to mend, and no
    error of ours."""
    if isinstance(error, OSError) and _is_of_disk(error, folder):
        where, fix = error.filename or folder.path, "make room" if error.errno in _FULL else "mend that"
        return RunError(f"run_dir: {where} cannot be written: {error.strerror}; {fix}, and give the command again")
    if isinstance(error, RayError):
        return RunError(last_line(error))
    return error


def _is_of_disk(error: OSError, folder: RunFolder) -> bool:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return not folder.path.is_dir()
    if error.errno == errno.EACCES:  # which reading a model or a template may raise, too
        return error.filename is not None and folder.path in Path(error.filename).parents
    return error.errno in _DISK


def _begin(job: Job, console: Console) -> None:
    """The folder is as the run begins, or as it was at the cut from which it goes on."""
    recipe, folder, resume = job.recipe, job.folder, job.resume
    if resume is not None:
        folder.rewind(recipe, resume.cut.version)
        CheckpointStore(folder.checkpoints, best=recipe.checkpoint.best).discard_after(resume.cut.version)
        notes = [f"going on from step {resume.cut.version} of {recipe.steps}", *resume.notes]
        console.print(*notes, sep="\n", highlight=False, soft_wrap=True, markup=False)
        return
    if job.seen == (False, True):
        console.print("an earlier run ended here before its first checkpoint: it begins anew", highlight=False)
    folder.create(recipe, job.overwrite)
    if isinstance(recipe.model, TinyModel):
        make_tiny_model(recipe.model, folder.path / "initial_model", recipe.seed)


def _train(job: Job, pools: ReservedPools, console: Console) -> None:
    recipe, folder = job.recipe, job.folder
    model = _source(recipe, folder)
    loaded = load_tokenizer(model.path, model.revision, model.trust_remote_code)
    tokenizer = with_template(loaded, recipe.model.chat_template)
    num_positions = max_model_length(model.path, model.revision, model.trust_remote_code)
    stream = stream_of(recipe, job.rows, tokenizer, num_positions)
    with RunProgress(recipe.name, recipe.steps, console) as progress:
        match recipe, stream:
            case GrpoRecipe(), PromptStream():
                run_to_end(
                    run_grpo(recipe, model, stream, tokenizer, pools, folder, progress, job.resume), progress.say
                )
            case OfflineRecipe(), ExampleStream() | PairStream() | JudgementStream():
                run_to_end(run_sft(recipe, model, stream, tokenizer, pools, folder, progress, job.resume), progress.say)


def _conclude(folder: RunFolder, console: Console) -> None:
    """What came of the run, and where to look."""
    summary, where = folder.read_summary(), os.path.relpath(folder.path)
    lines = [f"finished in {summary['wall_s']:.0f} s: see {where} (summary.json, metrics.jsonl, model/)"]
    if summary.get("reward_first") is not None:
        lines = [
            f"mean reward {summary['reward_first']:.3f} in the first tenth of the steps, "
            f"{summary['reward_last']:.3f} in the last (picture: {where}/{folder.plot.name})",
            f"staleness {summary['max_staleness_seen']} at most, {summary['max_staleness_allowed']} allowed; "
            f"groups trained {summary['groups_trained']}, lost {summary['groups_lost']}, "
            f"twice {summary['groups_duplicated']}",
            *lines,
        ]
    console.print(*lines, sep="\n", highlight=False, soft_wrap=True, markup=False)


def _source(recipe: Recipe, folder: RunFolder) -> ModelSource:
    """Where the workers find the model when the run begins."""
    match recipe.model:
        case TinyModel():
            return ModelSource(str(folder.path / "initial_model"))
        case PretrainedModel() | RecipeModel() as model:
            return source_of(model)


def words(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, int]:
    """The tokenizer as the run uses it, and the positions of the model, also of one that has yet to be made."""
    tokenizer, num_positions = _words_of_model(recipe)
    return with_template(tokenizer, recipe.model.chat_template), num_positions


def _words_of_model(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, int]:
    match recipe.model:
        case TinyModel() as tiny:
            return byte_tokenizer(tiny.max_position_embeddings), tiny.max_position_embeddings
        case RecipeModel():
            source = load_recipe(recipe.model.recipe)
            if not RunFolder(source.folder).finished:
                return words(source)
    model = _source(recipe, RunFolder(recipe.folder))
    tokenizer = load_tokenizer(model.path, model.revision, model.trust_remote_code)
    return tokenizer, max_model_length(model.path, model.revision, model.trust_remote_code)


def _check_reference(
    key: str, reference: PretrainedModel | RecipeModel, tokenizer: PreTrainedTokenizerBase, num_positions: int
) -> None:
    """ValueError unless it reads the policy's tokens, and as long sequences."""
    source = load_recipe(reference.recipe) if isinstance(reference, RecipeModel) else None
    if source is not None and not RunFolder(source.folder).finished:
        theirs, theirs_positions = words(source)
    else:
        place = source_of(reference)
        theirs = load_tokenizer(place.path, place.revision, place.trust_remote_code)
        theirs_positions = max_model_length(place.path, place.revision, place.trust_remote_code)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{key}: its tokenizer is not the policy's, so it cannot read the policy's tokens; choose a model of the "
            "same family"
        )
    if theirs_positions < num_positions:
        raise ValueError(
            f"{key}: it has {theirs_positions} positions, the policy {num_positions}; choose a model with as many"
        )


def _skeleton(recipe: Recipe) -> PreTrainedModel:
    """The model without weights, also one that has yet to be made."""
    match recipe.model:
        case TinyModel() as tiny:
            return tiny_skeleton(tiny)
        case RecipeModel():
            source = load_recipe(recipe.model.recipe)
            if not RunFolder(source.folder).finished:
                return _skeleton(source)
    model = _source(recipe, RunFolder(recipe.folder))
    return load_skeleton(model.path, model.revision, model.trust_remote_code)


def stream_of(
    recipe: Recipe, rows: Rows, tokenizer: PreTrainedTokenizerBase, num_positions: int
) -> PromptStream | Stream:
    """The tokenized data, its first rows looked at; ValueError when the model has no room for it."""
    match recipe:
        case GrpoRecipe():
            generation = recipe.generation
            longest = generation.max_prompt_length + generation.max_completion_length
            if longest > num_positions:
                raise ValueError(
                    f"generation: max_prompt_length {generation.max_prompt_length} + max_completion_length "
                    f"{generation.max_completion_length} = {longest} tokens, but the model has {num_positions} "
                    "positions; lower one of them"
                )
            prompts = PromptStream(rows, tokenizer, recipe.seed, recipe.dataset.shuffle, generation.max_prompt_length)
            prompts.preflight(max_bad_rows=recipe.dataset.max_bad_rows)
            examples = data_examples(recipe, rows, tokenizer)
            if examples is not None:
                examples.preflight()
            return prompts
        case OfflineRecipe():
            if recipe.max_length > num_positions:
                raise ValueError(
                    f"max_length: {recipe.max_length} tokens, but the model has {num_positions} positions; "
                    "lower max_length"
                )
            return example_stream(recipe, rows, tokenizer)
