"""Below an adapter a model of four bits trains, refers, is kept and is saved as one of whole weights does.

On the CPU, by bitsandbytes' kernels there: the real model, loaded, adapted and saved by what a policy rank calls.
"""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from actors.model.files import MODEL
from actors.model.forward import row_logprobs
from actors.model.learner import load_learner
from actors.model.load import load_causal_lm, load_skeleton
from actors.model.lora import (
    ADAPTER_FOLDER,
    base_digest,
    describe_adapter,
    trained_parameters,
    without_adapter,
)
from actors.model.quantize import check_whole, merge_over, quantization, save_over_the_whole
from actors.objective import Objective
from actors.policy_state import PolicyState
from algorithms.config import GrpoConfig
from algorithms.packed import PackedRow, pack_row
from tests.actors.model.four_bits import QLORA, WHOLE, below, check_merged, learner, of_four_bits, settings
from tests.actors.test_policy import rollouts

BLOCK = 64
"""Weights that share a scale, which is the largest of them."""
WIDEST = 0.1520
"""Half the widest gap between neighbours of the 16 values, as a share of the scale: from -1 to -0.6962."""
SCALES = 0.01
"""How far the eight bits of a scale may be off, and bfloat16 may round, as a share of the largest scale: half of
0.9 / 64, the widest gap of their 256 values, and 2**-9."""


def row() -> PackedRow:
    return pack_row(rollouts(), [0.0] * len(rollouts()), 0)


def logprobs(model: PreTrainedModel) -> Tensor:
    """As a rank is asked for them."""
    model.eval()
    with torch.no_grad():
        found_N, _ = row_logprobs(model, row(), 1.0)
    model.train()
    return found_N


def move(model: PreTrainedModel) -> dict[str, Tensor]:
    """Make the adapters add something; they as they travel."""
    torch.manual_seed(3)
    for parameter in trained_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    return {name: parameter.detach().clone() for name, parameter in trained_parameters(model).items()}


def frozen(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copies of all that is below the adapters, scales included."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    model.zero_grad()
    row_logprobs(model, row(), 1.0)[0].sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_linear_layers_are_held_in_four_bits_and_nothing_else_is(tiny_models: dict[str, Path], name: str) -> None:
    """In 4.127 bits a weight, as `plan` counts."""
    model, plain = learner(tiny_models[name]), dict(learner(tiny_models[name], WHOLE).named_parameters())
    num_weights = num_bytes = 0
    assert len(below(model)) == 2 * 7
    for at, weight in below(model).items():
        whole, state = plain[at.replace(".weight", ".base_layer.weight")], weight.quant_state
        assert (weight.dtype, 2 * weight.numel(), state.quant_type) == (torch.uint8, whole.numel(), "nf4")
        assert state.nested, "scales are quantized, too"
        assert (state.absmax.dtype, state.absmax.numel()) == (torch.uint8, whole.numel() // BLOCK)
        num_weights += whole.numel()
        num_bytes += weight.nbytes + state.absmax.nbytes + 4 * whole.numel() / (BLOCK * 256)
    assert num_bytes / num_weights == pytest.approx(4.127 / 8, rel=1e-3)
    others = {at: p for at, p in model.named_parameters() if "_proj" not in at}
    assert {p.dtype for p in others.values()} == {torch.bfloat16}
    assert all(torch.equal(p, plain[at]) for at, p in others.items())


def test_no_weight_is_off_by_more_than_its_gap(tiny_models: dict[str, Path]) -> None:
    """And on the whole they are as far off as normal numbers are, of which it makes 0.092 of their size."""
    plain = load_causal_lm(str(tiny_models["untied"]), None, False, "bfloat16")
    for name, held in of_four_bits(tiny_models["untied"]).items():
        whole = plain.get_parameter(name).detach().float()
        off_BK = (held.float() - whole).view(-1, BLOCK).abs()
        scale_B = whole.view(-1, BLOCK).abs().amax(1)
        assert bool((off_BK <= WIDEST * scale_B[:, None] + SCALES * scale_B.max()).all()), name
        assert 0.08 < float((held.float() - whole).norm() / whole.norm()) < 0.11, name


def test_a_base_of_four_bits_says_what_the_weights_say_that_it_stands_for(tiny_models: dict[str, Path]) -> None:
    """To bfloat16's rounding. From the plain model it is as far as one whose weights are off by noise of that size is:
    errors of rounding know nothing of what the weights are for."""
    path = tiny_models["untied"]
    said_N, plain = logprobs(learner(path)), learner(path, WHOLE)
    whole_N = logprobs(plain)
    weights = {name: weight.detach().clone() for name, weight in below(plain).items()}

    def with_weights(others: dict[str, Tensor]) -> Tensor:
        for name, weight in below(plain).items():
            weight.data.copy_(others[name])
        return logprobs(plain)

    held = of_four_bits(path)
    rounding = float((with_weights(held) - said_N).abs().max())
    noise = {name: (held[name] - weight).float().std() * torch.randn(weight.shape) for name, weight in weights.items()}
    as_noise = float((with_weights({name: w + noise[name] for name, w in weights.items()}) - whole_N).norm())
    by_four_bits = float((said_N - whole_N).norm())
    assert rounding < 0.01
    assert as_noise / 2 < by_four_bits < 2 * as_noise


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_adapters_alone_and_stay_the_same(tiny_models: dict[str, Path], checkpointing: bool) -> None:
    """Also after passes that need none, in which bitsandbytes would pack the weights anew on some CPUs."""
    told = settings(tiny_models["untied"])
    policy = told.policy.model_copy(update={"gradient_checkpointing": checkpointing})
    model, _ = load_learner(replace(told, policy=policy))
    move(model)
    model.train()
    before, base = gradients(model), frozen(model)
    assert before.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and bool(grad.abs().max() > 0) for name, grad in before.items())
    assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules())
    logprobs(model)
    Objective(None, 1.0, 16, reference_below=True).referred(model, row())
    after = gradients(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(tensor, base[name]) for name, tensor in frozen(model).items())


def test_gradients_are_those_of_the_weights_that_four_bits_stand_for(tiny_models: dict[str, Path]) -> None:
    path = tiny_models["untied"]
    model, plain = learner(path), learner(path, WHOLE)
    for name, weight in below(plain).items():
        weight.data.copy_(of_four_bits(path)[name])
    move(model)
    move(plain)
    expected = gradients(plain)
    for name, grad in gradients(model).items():
        assert float((grad - expected[name]).norm() / expected[name].norm()) < 0.03, name


def test_adapters_begin_as_on_whole_weights(tiny_models: dict[str, Path]) -> None:
    ours, others = (trained_parameters(learner(tiny_models["untied"], lora)) for lora in (QLORA, WHOLE))
    assert ours.keys() == others.keys()
    assert all(torch.equal(parameter, others[name]) for name, parameter in ours.items())


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_without_its_adapter_it_is_its_base(tiny_models: dict[str, Path], name: str) -> None:
    """To the bit: the reference is the model of four bits."""
    model = learner(tiny_models[name])
    base_N = logprobs(model)
    move(model)
    adapted_N = logprobs(model)
    assert not torch.allclose(adapted_N, base_N, atol=0.05)
    with without_adapter(model):
        assert torch.equal(logprobs(model), base_N)
    reference_N = Objective(None, 1.0, 16, reference_below=True).referred(model, row()).reference_logprobs_N
    assert reference_N is not None
    assert torch.equal(reference_N, base_N)
    assert torch.equal(logprobs(model), adapted_N)


def test_steps_lower_the_loss_and_the_base_does_not_move(tiny_models: dict[str, Path]) -> None:
    model = learner(tiny_models["untied"])
    base = frozen(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = -row_logprobs(model, row(), 1.0)[0].mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        logprobs(model)
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(tensor, base[name]) for name, tensor in frozen(model).items())


def test_the_digest_is_of_this_base_alone(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Weights twice as large have the same four bits, and other scales."""
    path = tiny_models["untied"]
    digests = [load_learner(settings(path))[1] for _ in range(2)]
    assert digests[0] == digests[1] is not None
    weights = load_file(path / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 2
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    others = [load_learner(settings(other))[1] for other in (tmp_path, tiny_models["other"])]
    assert len({digests[0], *others, load_learner(settings(path, WHOLE))[1]}) == 4
    assert load_learner(settings(path, WHOLE))[1] == base_digest(load_causal_lm(str(path), None, False, "bfloat16"))


def test_a_checkpoint_of_its_adapter_is_read_back(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """By a rank, to the bit; others find in it the adapter over the whole model."""
    path = tiny_models["untied"]
    model, digest = load_learner(settings(path))
    adapter = move(model)
    masters = {name: tensor.float() for name, tensor in adapter.items()}
    PolicyState(3, masters, {}, {}, 1, {}, base=digest).write(tmp_path)
    describe_adapter(model, tmp_path / MODEL)

    other, base = load_learner(settings(path))
    state = PolicyState.read(tmp_path)
    assert state.base == base
    with torch.no_grad():
        for name, parameter in trained_parameters(other).items():
            parameter.copy_(state.weights[name])
    assert torch.equal(logprobs(other), logprobs(model))
    ids = torch.arange(40, 60)[None]
    named = AutoModelForCausalLM.from_pretrained(tmp_path / MODEL).eval()
    whole = load_causal_lm(str(path), None, False, "float32")
    merge_over(whole, masters, QLORA.lora_alpha / QLORA.r)
    assert torch.allclose(named(ids).logits, whole(ids).logits, atol=1e-4)


def test_saved_is_the_adapter_over_the_whole_model(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Which plain transformers loads, and which is what the replicas compute with."""
    path = tiny_models["untied"]
    model = learner(path)
    adapter = move(model)
    save_over_the_whole(adapter, model, settings(path), tmp_path)

    check_merged(tmp_path, path, QLORA)
    saved, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values())
    assert "quantization_config" not in saved.config.to_dict()
    ids = torch.arange(40, 60)[None]
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    read = peft.PeftModel.from_pretrained(base, tmp_path / ADAPTER_FOLDER).eval()
    assert torch.allclose(read(ids).logits, saved(ids).logits, atol=0.1)


def test_a_model_that_samples_by_other_settings_is_saved_all_the_same(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """As models are that say how to sample, and not to."""
    model = learner(tiny_models["untied"])
    adapter = move(model)
    path = tmp_path / "before"
    path.mkdir()
    for file in tiny_models["untied"].iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (path / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "top_p": 0.9}')
    save_over_the_whole(adapter, model, settings(path), tmp_path / "after")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "after").generation_config.temperature == 0.6


def test_weights_that_are_quantized_already_are_refused(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """They would be found out when the run is over, and nothing can be merged into them."""
    path = tiny_models["untied"]
    four_bits = quantization(QLORA, "bfloat16")
    load_causal_lm(str(path), None, False, "bfloat16", quantization=four_bits).save_pretrained(tmp_path)
    check_whole(load_skeleton(str(path), None, False))
    with pytest.raises(
        ValueError, match=rf"model.path: the weights of '{tmp_path}' are quantized already.*lora.quantize"
    ):
        check_whole(load_skeleton(str(tmp_path), None, False))


def test_grpo_with_a_penalty_begins_at_no_divergence(tiny_models: dict[str, Path]) -> None:
    """From the model of four bits, and not from the whole one."""
    model = learner(tiny_models["untied"])
    objective = Objective(GrpoConfig(loss_type="grpo", beta=0.5), 1.0, 16, reference_below=True)
    referred = objective.referred(model, row())
    assert referred.reference_logprobs_N is not None
    values_N, _ = objective.values(model, referred)
    assert torch.allclose(values_N, referred.reference_logprobs_N, atol=0.02)
