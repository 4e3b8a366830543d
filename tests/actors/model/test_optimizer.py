"""What is decayed is what transformers' Trainer decays, and every schedule of the recipe is one of transformers'."""

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
    Trainer,
    get_scheduler,
)

from actors.model.lora import adapt
from actors.model.optimizer import adamw
from actors.recipe.policy import LoraConfig
from algorithms.config import OptimizerConfig

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


@pytest.mark.parametrize("name", get_args(OptimizerConfig.model_fields["lr_scheduler_type"].annotation))
def test_every_schedule_is_one_of_transformers(name: str) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule: Any = get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=10)
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(1e-3)
    assert rates[0] == (1e-3 if name == "constant" else 0.0)
    assert (rates[-1] < rates[3]) == (name in ("linear", "cosine"))
