"""Which keys a method leaves without effect, or without sense: those with a loss in place of GRPO's, and GRPO's own."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from algorithms.config import GrpoConfig
from algorithms.health.config import Rule

if TYPE_CHECKING:
    from actors.recipe.schema import GrpoRecipe

_OF_ANY_METHOD = ("num_generations", "beta", "dynamic_sampling", "mask_truncated_completions")


def method_refusals(recipe: "GrpoRecipe") -> Iterator[str]:
    """What is wrong with the choice of a method; the first is what the user reads."""
    if recipe.distillation is not None and recipe.online_dpo is not None:
        yield "online_dpo: a step has one loss, and distillation asks for another; leave one of them out"
    if recipe.distillation is not None:
        yield from _of_distillation(recipe)
        yield from _without_effect(recipe, "distillation")
    if recipe.online_dpo is not None:
        yield from _of_online_dpo(recipe)
        yield from _without_effect(recipe, "online_dpo")
    if recipe.distillation is None and recipe.online_dpo is None:
        yield from _of_cut_samples(recipe)
    judges = [reward.judge for reward in recipe.rewards.functions if reward.judge is not None]
    if judges and recipe.algorithm.num_generations != 2:
        yield (
            f"rewards.functions: {judges[0]}: a judge compares two completions, and algorithm.num_generations is "
            f"{recipe.algorithm.num_generations}; set it to 2, or take a reward function"
        )


def _of_distillation(recipe: "GrpoRecipe") -> Iterator[str]:
    if recipe.reference is None:
        yield (
            "distillation: there is no teacher; name it under reference, such as {kind: pretrained, path: "
            "organisation/model}"
        )
    if recipe.algorithm.beta > 0:
        yield (
            f"algorithm.beta: {recipe.algorithm.beta:g} would weigh a KL penalty, and distillation has none, but a "
            "divergence of its own (distillation.beta); set algorithm.beta to 0"
        )


def _of_online_dpo(recipe: "GrpoRecipe") -> Iterator[str]:
    if recipe.algorithm.beta == 0:
        yield (
            "algorithm.beta: 0 would let online_dpo go as far from the reference as it likes; set it above 0, such as "
            "to 0.1"
        )
    if recipe.algorithm.num_generations < 2:
        yield "algorithm.num_generations: a preference needs two samples of a prompt; set it to 2 or more"
    if any(rule.kind == "kl" for rule in recipe.health.rules):
        yield "health.rules: the rule 'kl' looks at a metric that is not measured beside online_dpo; leave the rule out"
    if recipe.staleness.when_stale == "mask":
        yield (
            "staleness.when_stale: 'mask' takes single tokens out, and online_dpo compares whole completions; set it "
            "to pace or requeue"
        )


def _of_cut_samples(recipe: "GrpoRecipe") -> Iterator[str]:
    """A replica records what it has sampled from: with top_p or top_k the tokens that are left, scaled up by 1 / Z.

    On policy the ratio to that is Z at every token. Of a whole rollout it is the product, which falls with the length;
    GSPO's mean over the tokens stays at Z, outside of its clip range.
    """
    generation, algorithm = recipe.generation, recipe.algorithm
    if generation.top_p < 1:
        key, value, whole = "top_p", generation.top_p, 1
    elif generation.top_k > 0:
        key, value, whole = "top_k", generation.top_k, 0
    else:
        return
    says = f"generation.{key}: {value:g} samples from a part of the distribution, so whole rollouts look off policy"
    mode, level = algorithm.vllm_importance_sampling_mode, algorithm.importance_sampling_level
    if algorithm.vllm_importance_sampling_correction and mode.startswith("sequence"):
        yield (
            f"{says} to algorithm.vllm_importance_sampling_mode {mode!r}; set {key} to {whole}, or the mode to "
            "'token_truncate'"
        )
    if level != "token" and algorithm.old_logprobs != "recomputed":
        yield (
            f"{says} to algorithm.importance_sampling_level {level!r}; set {key} to {whole}, or algorithm.old_logprobs "
            "to 'recomputed'"
        )
    least = generation.top_p if generation.top_k <= 0 else 0.0
    bounds = algorithm.geometric_mask_range
    if bounds is not None and bounds[0] > least:
        yield (
            f"{says} to algorithm.geometric_mask_range {list(bounds)}; set {key} to {whole}, or "
            f"its lower bound to {least:g} or less"
        )


def _without_effect(recipe: "GrpoRecipe", method: str) -> Iterator[str]:
    """Keys of GRPO's loss that were given another value than their default."""
    known: tuple[str, ...] = _OF_ANY_METHOD
    if recipe.algorithm.num_generations == 1:  # of which GrpoConfig wants to be told that nothing is compared
        known += ("baseline", "scale_rewards")
    for key, field in GrpoConfig.model_fields.items():
        if key not in known and recipe.algorithm.model_dump()[key] != field.default:
            yield f"algorithm.{key}: it has no effect beside {method}, which has a loss of its own; leave it out"
    if recipe.staleness.adapt_depth is not None:
        yield (f"staleness.adapt_depth: the sample size that it follows is not measured beside {method}; leave it out")


def is_about(rule: Rule, recipe: "GrpoRecipe") -> bool:
    """Whether what the rule looks at says how a run of this method is doing."""
    algorithm = recipe.algorithm
    # With a teacher that speaks in every token's advantage, rewards may be there to be looked at alone.
    only_measured = algorithm.kl_penalty == "advantage" and not any(each.weight for each in recipe.rewards.functions)
    learns_rewards = recipe.distillation is None and not only_measured
    is_judged = all(each.judge is not None for each in recipe.rewards.functions if each.weight)
    match rule.kind:
        case "off_policy":  # another loss than GRPO's measures no ratios
            return recipe.distillation is None and recipe.online_dpo is None
        case "zero_std":  # equal rewards say nothing only where the group is what they are compared with
            return learns_rewards and algorithm.baseline != "none"
        case "length":  # of the two rewards of a pair that is judged the mean is always a half
            return learns_rewards and not is_judged
        case _:
            return True
