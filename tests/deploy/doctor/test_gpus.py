"""What driver, CUDA and NCCL say, or fail to say, is told; on a machine without a GPU by what one would have said."""

import sys
from typing import Any

import pytest

from deploy.doctor.gpus import asked, check_cuda, check_driver, check_wire, gpus_gb, tell

H100 = "NVIDIA H100 80GB HBM3, 81559, 580.95.05\n"
GOOD: dict[str, Any] = {"torch": "2.13.0+cu130", "cuda": "13.0", "num_gpus": 2, "nccl": "2.29.7", "wire": "22907"}


def test_the_drivers_list_is_read() -> None:
    assert gpus_gb(2 * H100) == pytest.approx([79.6, 79.6], abs=0.1)
    assert gpus_gb(None) == ()
    assert check_driver(2 * H100, 2).text == "2 x NVIDIA H100 80GB HBM3, driver 580.95.05"


@pytest.mark.parametrize(
    ("text", "wanted", "level", "said"),
    [
        (None, 0, "skip", "none is asked for"),
        (None, 4, "fail", "the recipe's workers have 4"),
        (H100, 2, "fail", "1 x NVIDIA H100 80GB HBM3, driver 580.95.05; the recipe's workers have 2"),
        (2 * H100, 1, "pass", "2 x"),
    ],
)
def test_a_machine_has_the_gpus_that_workers_have(text: str | None, wanted: int, level: str, said: str) -> None:
    found = check_driver(text, wanted)
    assert found.level == level
    assert said in found.text


@pytest.mark.parametrize(
    ("told", "wanted", "level"),
    [
        (GOOD, 2, "pass"),
        (GOOD, 4, "fail"),
        (GOOD | {"cuda": None}, 2, "fail"),
        (GOOD | {"cuda": None}, 0, "skip"),
        ({"error": "no kernel image is available"}, 1, "fail"),
    ],
)
def test_cuda_computes_on_every_gpu(told: dict[str, Any], wanted: int, level: str) -> None:
    assert check_cuda(told, wanted).level == level


@pytest.mark.parametrize(
    ("told", "transport", "level"),
    [
        (GOOD, "nccl", "pass"),
        ({"wire_error": "needs cupy"}, "nccl", "fail"),
        ({"wire_error": "needs cupy"}, "gloo", "skip"),
        ({}, "nccl", "skip"),
    ],
)
def test_cupy_is_needed_by_who_asks_for_nccl(told: dict[str, Any], transport: str, level: str) -> None:
    assert check_wire(told, transport).level == level


def test_a_child_that_dies_is_told_by_its_last_words() -> None:
    script = "import sys; print('first', file=sys.stderr); sys.exit('CUDA error: device-side assert')"
    assert asked([sys.executable, "-c", script]) == {"error": "CUDA error: device-side assert"}
    assert asked([sys.executable, "-c", "raise SystemExit(7)"]) == {"error": "exit status 7"}


def test_torch_without_cuda_says_so() -> None:
    import torch

    told = tell()
    assert told["torch"] == torch.__version__
    assert (told["num_gpus"] == 0) == (not torch.cuda.is_available())
