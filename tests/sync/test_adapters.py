"""A running vLLM engine goes over to an adapter that comes in memory, or says which tensor kept it from doing so."""

import multiprocessing as mp
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.model.load import load_skeleton
from actors.model.lora import adapt, engine_arguments, trained_parameters
from actors.recipe.policy import LoraConfig

LORA = LoraConfig(r=3, lora_alpha=4, target_modules=("q_proj", "v_proj", "o_proj", "up_proj"))
IDS = list(range(40, 60))
TIMEOUT_S = 120.0
Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
UP = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"


def serve(path: str, pipe: Connection) -> None:
    """The engine in a process of its own: it takes adapters, and scores IDS."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    from vllm import LLM, SamplingParams

    from sync.adapters import adapter_request

    llm = LLM(
        path,
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=64,
        max_num_seqs=4,
        worker_extension_cls="sync.receiver.WeightReceiver",
        **engine_arguments(LORA, load_skeleton(path, None, False)),
    )
    core: Any = llm.llm_engine.engine_core
    serving = core.engine_core.model_executor.driver_worker.worker._serving(staged=True)
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    while (tensors := pipe.recv()) is not None:
        try:
            serving.begin()
            for name, tensor in tensors.items():
                serving.arrived({name: tensor})
            serving.swap(())
            refused = ""
        except RuntimeError as error:
            refused = str(error)
        for tensor in tensors.values():
            tensor.fill_(7.0)  # as the next version writes over the staging buffers
        output = llm.generate([{"prompt_token_ids": IDS}], sampling, lora_request=adapter_request(), use_tqdm=False)[0]
        scores = zip(IDS[1:], output.prompt_logprobs[1:], strict=True)
        pipe.send((refused, [entry[token].logprob for token, entry in scores], serving.checksum()))


class Replica:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._pipe, theirs = mp.get_context("spawn").Pipe()
        self._process = mp.get_context("spawn").Process(target=serve, args=(str(path), theirs))
        self._process.start()

    def take(self, tensors: dict[str, torch.Tensor]) -> tuple[str, torch.Tensor, str]:
        """What it says against an adapter, and then its log-probabilities and the checksum of what it holds."""
        self._pipe.send(tensors)
        assert self._pipe.poll(TIMEOUT_S), "the engine answers"
        refused, logprobs, checksum = self._pipe.recv()
        return refused, torch.tensor(logprobs), checksum

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join(TIMEOUT_S)


@pytest.fixture(scope="module")
def replica(tiny_models: dict[str, Path]) -> Iterator[Replica]:
    replica = Replica(tiny_models["untied"])
    yield replica
    replica.close()


def adapter(path: Path, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Some adapter as it travels, and the log-probabilities of IDS that transformers and peft compute with it."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    adapt(model, LORA)
    torch.manual_seed(seed)
    for parameter in trained_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.tensor(IDS)
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])[:, 0]
    return {name: parameter.detach().clone() for name, parameter in trained_parameters(model).items()}, logprobs


@pytest.mark.cluster
def test_one_adapter_after_the_other_serves(replica: Replica) -> None:
    checksums = []
    for seed in (0, 1, 0):
        tensors, expected = adapter(replica.path, seed)
        refused, logprobs, checksum = replica.take(tensors)
        assert refused == ""
        assert torch.allclose(logprobs, expected, atol=1e-4)
        assert not torch.allclose(logprobs, adapter(replica.path, 1 - seed)[1], atol=1e-2)
        checksums.append(checksum)
    assert checksums[0] == checksums[2] != checksums[1], "of the adapter that serves, and of nothing else"


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({Q: None}, "1 tensors of the adapter were not among the weights sent: model.layers.1.self_attn.q_proj.lora_A"),
        ({UP: torch.zeros(256, 8)}, f"{UP} was sent with shape (256, 8), but the model takes (256, 3)"),
        ({UP: torch.zeros(64, 3)}, f"{UP} was sent with shape (64, 3), but the model takes (256, 3)"),
        ({Q: torch.zeros(3, 32)}, f"{Q} was sent with shape (3, 32), but the model takes (3, 64)"),
        ({Q.replace("q_proj", "k_proj"): torch.zeros(3, 64)}, "takes no adapter there"),
        ({Q.replace("layers.1", "layers.2"): torch.zeros(3, 64)}, "takes no adapter there"),
        (
            {"model.embed_tokens.weight": torch.zeros(320, 64)},
            "model.embed_tokens.weight was sent, but it is no tensor",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    replica: Replica, change: dict[str, torch.Tensor | None], expected: str
) -> None:
    tensors, held = adapter(replica.path, 0)
    accepted, _, checksum = replica.take(tensors)
    assert accepted == ""
    others = {**adapter(replica.path, 1)[0], **change}
    refused, logprobs, held_now = replica.take({name: tensor for name, tensor in others.items() if tensor is not None})
    assert expected in refused
    assert held_now == checksum
    assert torch.allclose(logprobs, held, atol=1e-4), "the adapter before goes on serving"
