"""What each worker is told: the values of the recipe that it needs, and not the recipe."""

from dataclasses import replace
from pathlib import Path

from actors.objective import Objective
from actors.policy_calls import ModelSource, PolicySettings
from actors.recipe.critic import CriticConfig
from actors.recipe.deadlines import score_timeout_s
from actors.recipe.file import load_recipe
from actors.recipe.model import PretrainedModel, RecipeModel
from actors.recipe.pools import used_pools
from actors.recipe.preference import PreferenceRecipe, RewardRecipe
from actors.recipe.rewards import RewardConfig
from actors.recipe.schema import GrpoRecipe, Recipe, SftRecipe
from actors.reference import ReferenceSettings
from actors.rollout import RolloutSettings
from actors.run.folder import RunFolder
from placement.plan import guests_of


def source_of(model: PretrainedModel | RecipeModel) -> ModelSource:
    """Where a model is that is not made here."""
    match model:
        case RecipeModel(recipe=recipe):
            return ModelSource(str(RunFolder(load_recipe(recipe).folder).model))
        case PretrainedModel(path=path, revision=revision, trust_remote_code=trust):
            local = Path(path).expanduser()
            return ModelSource(str(local.absolute()) if local.is_dir() else path, revision, trust)


def reward_functions(recipe: GrpoRecipe) -> tuple[RewardConfig, ...]:
    """A reward model that is here is found from the workers' own working directories, too."""
    return tuple(
        function.model_copy(update={"model": source_of(PretrainedModel(kind="pretrained", path=function.model)).path})
        if function.model is not None
        else function
        for function in recipe.rewards.functions
    )


def policy_settings(recipe: Recipe, model: ModelSource, run_dir: Path) -> PolicySettings:
    return PolicySettings(
        model_path=model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        num_ranks=recipe.pools.policy.num_workers,
        use_gpu=recipe.pools.policy.gpus_per_worker > 0,
        seed=recipe.seed,
        num_steps=recipe.steps,
        policy=recipe.policy,
        optimizer=recipe.optimizer,
        objective=_objective(recipe),
        run_dir=str(run_dir),
        teacher=_teacher(recipe),
        shares_gpu=recipe.pools.policy.gpus_per_worker > 0 and bool(guests_of(used_pools(recipe))),
    )


def critic_settings(recipe: GrpoRecipe, model: ModelSource, run_dir: Path) -> PolicySettings:
    """As the policy's but for what the recipe says of the critic; `model` is what the policy begins with."""
    assert recipe.pools.critic is not None, "there is no critic without a pool"
    config = recipe.critic or CriticConfig()
    model = model if config.model is None else source_of(config.model)
    like = policy_settings(recipe, model, run_dir)
    return replace(
        like,
        num_ranks=recipe.pools.critic.num_workers,
        use_gpu=recipe.pools.critic.gpus_per_worker > 0,
        policy=config.ranks_like(recipe.policy),
        optimizer=config.optimizer_like(recipe.optimizer),
        objective=replace(like.objective, numbers="values", cliprange_value=config.cliprange_value),
    )


def reference_settings(recipe: GrpoRecipe, model: ModelSource) -> ReferenceSettings:
    """`model` is what the policy begins with; the recipe may name another reference."""
    model = model if recipe.reference is None else source_of(recipe.reference)
    return ReferenceSettings(
        model_path=model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        dtype=recipe.policy.dtype,
        temperature=recipe.logprob_temperature,
        max_tokens=recipe.policy.max_tokens_per_micro_batch,
        use_gpu=recipe.pools.reference.gpus_per_worker > 0,
    )


def rollout_settings(recipe: GrpoRecipe, model: ModelSource) -> RolloutSettings:
    pool = recipe.pools.rollout
    return RolloutSettings(
        model_path=model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        num_generations=recipe.algorithm.num_generations,
        generation=recipe.generation,
        rollout=recipe.rollout,
        tensor_parallel_size=max(1, pool.gpus_per_worker),
        use_gpu=pool.gpus_per_worker > 0,
        seed=recipe.seed,
        score_timeout_s=score_timeout_s(recipe),
        in_flight_updates=recipe.staleness.in_flight_updates and recipe.staleness.max_staleness > 0,
        recompute_kv_cache=recipe.staleness.kv_cache == "recompute",
        lora=recipe.policy.lora,
        shares=pool.colocate_with is not None,
    )


def _teacher(recipe: Recipe) -> ModelSource | None:
    if not isinstance(recipe, GrpoRecipe) or recipe.distillation is None:
        return None
    assert recipe.reference is not None, "a recipe that distills names its teacher"
    return source_of(recipe.reference)


def _objective(recipe: Recipe) -> Objective:
    match recipe:
        case GrpoRecipe():
            generation = recipe.generation
            if recipe.distillation is not None:
                longest, distillation = generation.max_completion_length, recipe.distillation
                return Objective(None, 1.0, longest, numbers="divergences", distillation=distillation)
            return Objective(
                recipe.algorithm if recipe.online_dpo is None else None,
                recipe.logprob_temperature,
                generation.max_completion_length,
                numbers=None if recipe.online_dpo is None else "logprobs",
                reference_below=recipe.reference_below,
            )
        case SftRecipe():
            return Objective(None, temperature=1.0, max_completion_length=recipe.max_length)
        case RewardRecipe():
            return Objective(None, 1.0, recipe.max_length, numbers="scores")
        case PreferenceRecipe():
            return Objective(None, 1.0, recipe.max_length, numbers="logprobs", reference_below=recipe.reference_below)
