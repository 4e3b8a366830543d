"""What is decayed is what transformers' Trainer decays, and every schedule of the recipe is one of transformers'."""

import inspect
import json
from typing import Any, get_args

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SchedulerType,
    Trainer,
)
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from actors.model.lora import adapt
from actors.model.optimizer import adamw, schedule
from actors.policy_state import plain_schedule
from actors.recipe.policy import LoraConfig
from algorithms.config import OptimizerConfig
from algorithms.learning_rate import ARGUMENTS, Schedule, refusals_of_lengths

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
CONFIG = OptimizerConfig(weight_decay=0.1, learning_rate=1e-3)


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig])
def test_what_is_decayed_is_what_trainer_decays(kind: Any, adapted: bool) -> None:
    model = AutoModelForCausalLM.from_config(kind(**SIZES))
    if adapted:
        adapt(model, LoraConfig(r=2))
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {
        names[id(parameter)]: group["weight_decay"]
        for group in adamw(model, CONFIG).param_groups
        for parameter in group["params"]
    }
    assert found.keys() == set(names.values()), "every parameter that is trained is in one group"
    trainer = Trainer.__new__(Trainer)  # the method asks the model alone
    decayed = set(trainer.get_decay_parameter_names(model)) & found.keys()
    assert {name for name, decay in found.items() if decay == 0.1} == decayed
    assert {name for name, decay in found.items() if decay == 0.0} == found.keys() - decayed


# ---- Schedules

pytestmark = pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps")

STEPS, WARMUP = 20, 4
NEEDED: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 5},
}
"""What a schedule cannot do without."""
ALL = [(name, NEEDED.get(name, {})) for name in get_args(Schedule)]
FULL: list[tuple[str, dict[str, Any]]] = [
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_min_lr", {"min_lr": 2e-4, "num_cycles": 0.25}),
    ("cosine_warmup_with_min_lr", {"min_lr": 2e-4, "num_cycles": 0.25, "warmup_lr_rate": 0.5}),
    ("polynomial", {"lr_end": 1e-5, "power": 2}),
    ("inverse_sqrt", {"timescale": 7}),
    ("warmup_stable_decay", {"num_decay_steps": 5, "min_lr_ratio": 0.1, "num_cycles": 0.25, "warmup_type": "cosine"}),
    ("warmup_stable_decay", {"num_decay_steps": 6, "num_stable_steps": 10, "decay_type": "1-sqrt"}),
]


def optimizer_of(config: OptimizerConfig) -> torch.optim.Optimizer:
    return adamw(torch.nn.Linear(2, 2), config)


def rates_of(made: Any, num: int, factor: float = 1.0) -> list[float]:
    """The rates of the next so many steps, while somebody lowers what the optimizer takes by a factor."""
    rates = []
    for _ in range(num):
        rates.append(made.get_last_lr()[0])
        for group in made.optimizer.param_groups:
            group["lr"] = rates[-1] * factor
        made.optimizer.step()
        made.step()
    return rates


def config_of(name: str, arguments: dict[str, Any]) -> OptimizerConfig:
    warmup_steps = 0 if name == "constant" else WARMUP
    return OptimizerConfig.model_validate(
        {
            "learning_rate": 1e-3,
            "lr_scheduler_type": name,
            "lr_scheduler_kwargs": arguments,
            "warmup_steps": warmup_steps,
        }
    )


def rates(name: str, arguments: dict[str, Any], num_iterations: int = 1) -> list[float]:
    config = config_of(name, arguments)
    return rates_of(schedule(optimizer_of(config), config, STEPS, num_iterations), STEPS * num_iterations)


def test_every_schedule_of_transformers_that_needs_no_metrics_is_known_by_its_own_arguments() -> None:
    needs_metrics = {SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY}
    made = {kind.value: make for kind, make in TYPE_TO_SCHEDULER_FUNCTION.items() if kind not in needs_metrics}
    assert made.keys() == ARGUMENTS.keys() == set(get_args(Schedule))
    ours = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    for name, arguments in ARGUMENTS.items():
        assert set(inspect.signature(made[name]).parameters) - ours == arguments.keys(), name


@pytest.mark.parametrize(("name", "arguments"), ALL + FULL)
def test_a_schedule_is_transformers_own(name: str, arguments: dict[str, Any]) -> None:
    make = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    counts = {"num_warmup_steps": WARMUP, "num_training_steps": STEPS}
    taken = {key: value for key, value in counts.items() if key in inspect.signature(make).parameters}
    expected = rates_of(make(optimizer_of(config_of(name, arguments)), **taken, **arguments), STEPS)
    assert rates(name, arguments) == expected
    assert max(expected) <= 1e-3 * (1 + 1e-12)


def test_a_schedule_has_its_floor_and_its_plateau() -> None:
    assert rates("cosine_with_min_lr", {"min_lr_rate": 0.1})[-1] == pytest.approx(1e-4, rel=0.1)
    assert rates("cosine_with_min_lr", {"min_lr": 5e-4})[-1] == pytest.approx(5e-4, rel=0.02)
    found = rates("warmup_stable_decay", {"num_decay_steps": 5, "decay_type": "linear"})
    assert found == pytest.approx([1e-3 * f for f in (0, 0.25, 0.5, 0.75, *[1] * 12, 0.8, 0.6, 0.4, 0.2)])


@pytest.mark.parametrize(("name", "arguments"), ALL + FULL)
def test_what_a_recipe_counts_in_steps_is_in_steps_however_many_updates_each_makes(
    name: str, arguments: dict[str, Any]
) -> None:
    if name == "cosine_warmup_with_min_lr":
        pytest.skip("transformers counts its updates from 1")
    if (name, arguments) == ("inverse_sqrt", {}):
        arguments = {"timescale": WARMUP}  # what transformers takes then
    once, thrice = rates(name, arguments), rates(name, arguments, num_iterations=3)
    assert thrice[::3] == pytest.approx(once)


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize(("name", "arguments"), ALL + FULL)
def test_a_schedule_goes_on_from_a_checkpoint_and_beside_a_lowered_rate(
    name: str, arguments: dict[str, Any], factor: float
) -> None:
    config = config_of(name, arguments)
    for cut in (0, 3, WARMUP, 11, STEPS - 1):
        first = schedule(optimizer_of(config), config, STEPS, 1)
        before = rates_of(first, cut, factor)
        state = json.loads(json.dumps(plain_schedule(first.state_dict())))
        again = schedule(optimizer_of(config), config, STEPS, 1)
        again.load_state_dict(state)
        assert before + rates_of(again, STEPS - cut, factor) == rates(name, arguments)


@pytest.mark.parametrize(("name", "arguments"), ALL + FULL)
@pytest.mark.parametrize("warmup_steps", [0, 1, STEPS - 1, STEPS, STEPS + 1])
def test_no_step_of_a_schedule_that_is_not_refused_fails(
    name: str, arguments: dict[str, Any], warmup_steps: int
) -> None:
    config = config_of(name, arguments).model_copy(update={"warmup_steps": warmup_steps})
    if any(refusals_of_lengths(config.lr_scheduler_type, arguments, warmup_steps, STEPS)):
        return
    found = rates_of(schedule(optimizer_of(config), config, STEPS, 1), STEPS)
    assert all(0 <= rate <= 1e-3 * (1 + 1e-12) for rate in found)
