"""The GPUs of this machine answer to their driver, to torch, and to NCCL. Not run on a GPU yet.

What CUDA does is asked for in a child process: it may hang or crash there, and this process takes no memory of a GPU.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.doctor.check import Finding, failed, passed, skipped

_ROOT = Path(__file__).resolve().parents[2]
_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
_SMI_TIMEOUT_S = 20.0
CHILD_TIMEOUT_S = 120.0
_WIRE_TIMEOUT_S = 30.0
NO_GPU = "there is no GPU on this machine, by its driver"


def listed() -> str | None:
    """What the driver's own tool says, a line for each GPU; None without driver or GPU."""
    try:
        done = subprocess.run(_SMI, capture_output=True, text=True, timeout=_SMI_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 and done.stdout.strip() else None


def gpus_gb(text: str | None) -> tuple[float, ...]:
    """Memory of each GPU that the driver lists (it counts in MiB)."""
    rows = [line.rsplit(",", 2) for line in (text or "").splitlines() if line.strip()]
    return tuple(float(row[1]) / 1024 for row in rows if len(row) == 3 and row[1].strip().isdecimal())


def check_driver(text: str | None, wanted: int) -> Finding:
    """`wanted`: GPUs of the recipe's workers on this machine."""
    rows = [[cell.strip() for cell in line.rsplit(",", 2)] for line in (text or "").splitlines() if line.strip()]
    if not rows:
        if wanted:
            return failed(
                f"{NO_GPU}, and the recipe's workers have {wanted}",
                "install the driver, give the container its GPUs (docker run --gpus all), or name a cluster: --address",
            )
        return skipped(f"{NO_GPU}, and none is asked for")
    names = ", ".join(sorted({row[0] for row in rows}))
    text = f"{len(rows)} x {names}, driver {rows[0][-1]}"
    if len(rows) < wanted:
        return failed(
            f"{text}; the recipe's workers have {wanted}", "lower gpus_per_worker or num_workers of its pools"
        )
    return passed(text)


def check_cuda(told: dict[str, Any], wanted: int) -> Finding:
    """`told`: by `asked`."""
    if "error" in told:
        return failed(
            f"CUDA: {told['error']}", "install deploy/requirements/gpu.txt, and a driver for its CUDA version"
        )
    if told["cuda"] is None and not wanted:
        return skipped(f"torch {told['torch']} is built without CUDA, and no worker has a GPU")
    if told["cuda"] is None:
        return failed(f"torch {told['torch']} is built without CUDA", "pip install -r deploy/requirements/gpu.txt")
    text = f"torch {told['torch']} for CUDA {told['cuda']} computes on {told['num_gpus']} GPUs, NCCL {told['nccl']}"
    if told["num_gpus"] < wanted:
        return failed(
            f"{text}; the recipe's workers have {wanted}", "see CUDA_VISIBLE_DEVICES, and the driver's version"
        )
    return passed(text)


def check_wire(told: dict[str, Any], transport: str) -> Finding:
    """NCCL as weights take it: cupy's binding, in one process with torch."""
    if transport != "nccl":
        return skipped("sync.transport is gloo, which needs no cupy")
    if "wire_error" in told:
        return failed(f"cupy and NCCL: {told['wire_error']}", "pip install -r deploy/requirements/gpu.txt, or set "
                      "sync.transport=gloo")  # fmt: skip
    if "wire" not in told:
        return skipped("there is no CUDA device here to try it on")
    return passed(f"NCCL {told['wire']} through cupy broadcasts on one GPU beside torch")


def asked(arguments: Sequence[str] = (sys.executable, "-m", "deploy.doctor.gpus")) -> dict[str, Any]:
    """What torch and cupy say of the GPUs, in a child process; `error` when it says nothing."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(
            list(arguments), capture_output=True, text=True, timeout=CHILD_TIMEOUT_S, check=False, env=env
        )
    except subprocess.TimeoutExpired:
        return {"error": f"gave no answer in {CHILD_TIMEOUT_S:g} s"}
    try:
        told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return told


def tell() -> dict[str, Any]:
    """In the child: a multiplication on every GPU, and a broadcast to oneself."""
    import torch

    told: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "num_gpus": 0, "nccl": None}
    if not torch.cuda.is_available():
        return told
    for index in range(torch.cuda.device_count()):
        ones = torch.ones(64, 64, device=f"cuda:{index}")
        if float((ones @ ones)[0, 0]) != 64.0:
            return told | {"error": f"GPU {index} multiplies wrongly"}
    told |= {"num_gpus": torch.cuda.device_count(), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return told | _wire()


def _wire() -> dict[str, Any]:
    import torch

    from sync.nccl import NcclGroup, make_unique_id
    from sync.transport import WireError

    try:
        group = NcclGroup(make_unique_id(), 0, 1, torch.device("cuda", 0), _WIRE_TIMEOUT_S)
        group.broadcast(torch.ones(1 << 20, dtype=torch.uint8, device="cuda:0"))
        group.close()
        from cupy.cuda import nccl

        return {"wire": str(nccl.get_version())}
    except (ImportError, RuntimeError, WireError) as error:
        return {"wire_error": str(error)}


if __name__ == "__main__":
    print(json.dumps(tell()))
