"""What is saved of a model is loaded as it is, also when its generation config is none that transformers would save."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from actors.model.files import METADATA, WHOLE, describe, make_savable


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_described_weights_are_a_model(tiny_models: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Of a model in bfloat16 the float32 masters are saved."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models[name], dtype=torch.bfloat16)
    masters = {name: parameter.detach().float() + 1e-6 for name, parameter in model.named_parameters()}
    save_file(masters, tmp_path / WHOLE, metadata=METADATA)
    describe(model, tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read.dtype == torch.float32
    for name, parameter in read.named_parameters():
        assert torch.equal(parameter, masters[name]), name
    assert model.config.dtype == torch.bfloat16, "the model in training is as it was"


def test_sampling_settings_without_sampling_can_be_saved(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models["tied"])
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.6
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "before")
    make_savable(model)
    model.save_pretrained(tmp_path / "after")
    assert GenerationConfig.from_pretrained(tmp_path / "after").temperature == 0.6
