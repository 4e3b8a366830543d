"""AdamW, its learning rates, and how DeepSpeed is to drive it."""

from typing import Any

import torch
from transformers import get_scheduler

from actors.recipe.policy import PolicyConfig
from algorithms.config import OptimizerConfig
from algorithms.learning_rate import in_updates


def adamw(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW for what is trained; norms and biases are not decayed, as in transformers' Trainer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],  # adapters have neither norms nor biases
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )


def schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig, num_steps: int, num_iterations: int) -> Any:
    """The learning rates of a run of that many steps; it counts updates, of which each step makes `num_iterations`."""
    return get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=config.warmup_steps * num_iterations,
        num_training_steps=num_steps * num_iterations,
        scheduler_specific_kwargs=in_updates(config.lr_scheduler_kwargs, num_iterations),
    )


def deepspeed_config(policy: PolicyConfig, optimizer: OptimizerConfig) -> dict[str, Any]:
    """For `deepspeed.initialize`."""
    zero: dict[str, Any] = {"stage": policy.zero_stage}
    if policy.offload is not None:
        pinned = {"pin_memory": torch.cuda.is_available()}
        zero["offload_optimizer"] = {"device": policy.offload.optimizer} | pinned
        if policy.offload.parameters is not None:
            zero["offload_param"] = {"device": policy.offload.parameters} | pinned
    return {
        "train_micro_batch_size_per_gpu": 1,
        # Accumulation is ours: micro-batches differ in number and size from step to step.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.max_grad_norm,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW, on the host as well: DeepSpeed's own must be compiled
        "bf16": {"enabled": policy.dtype == "bfloat16"},
        # Many small micro-batches summed in bfloat16 would lose the small ones.
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
