"""A folder of weights is a model that others load as it is: what lies beside the weights says how.

model.safetensors           every weight; config.json and generation_config.json beside it: for transformers and vLLM
adapter_model.safetensors   adapters alone; adapter_config.json beside it names the model below: for peft and vLLM
"""

import copy
from pathlib import Path
from typing import Any

import torch

MODEL = "model"
"""Folder of a checkpoint in which it is a model."""
WHOLE, ADAPTER = "model.safetensors", "adapter_model.safetensors"
METADATA = {"format": "pt"}
"""Of every file of weights: without it transformers takes none."""


def describe(model: Any, folder: Path) -> None:
    """Write what others need to know of a whole model whose weights lie in the folder as float32."""
    config = copy.deepcopy(model.config)
    config.dtype = torch.float32
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.to_json_file(folder / "generation_config.json")  # as it is, valid or not


def make_savable(model: Any) -> None:
    """Transformers loads models whose generation config it refuses to save: settings of sampling, and no sampling."""
    if not model.can_generate():
        return
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True  # as the policy is sampled from
