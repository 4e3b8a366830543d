"""A replica swaps to a version only after it holds every byte of it, verified; until then the old version serves.

The receiver lives in each vLLM worker process (`worker_extension_cls`) and is driven by `collective_rpc`. The engine
does not step during such a call, so none of them waits for the network:

    join_group(...)      the broadcast group and the layout; again after a failure
    begin_receive(v)     threads fill the staging buffers and build the next weights while generation goes on
    ready()              whether they are done; asked again and again until it is so
    verify(v, digests)   all buckets are here and their digests match the sender's
    swap()               generation is paused: the model goes over to the next weights
"""

import ctypes
import signal
from typing import Any

from torch import device

from sync.adapters import ServingAdapter
from sync.member import Membership
from sync.reload import Reload
from sync.serving import ServingModel
from sync.staging import CPU, Staging

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


class WeightReceiver:
    """vLLM mixes this class into its worker; `model_runner`, `rank` and `device` are the worker's own."""

    model_runner: Any
    vllm_config: Any
    rank: int
    device: device

    def join_group(self, first: str, host: str) -> None:
        """Join the broadcast group in place of any other; `first` is the Membership of the replica's first worker."""
        membership = Membership.model_validate_json(first)
        config = membership.config
        if (old := getattr(self, "staging", None)) is not None:
            old.close()
        else:
            _die_with_parent()
            self.serving = self._serving(config.staging != "none")
        wire = membership.at(membership.rank + self.rank).join(host, self.device if config.transport == "nccl" else CPU)
        where = {"device": self.device, "host": CPU, "none": None}[config.staging]
        self.staging = Staging(membership.layout, wire, where=where, delta=config.delta, follower=self.serving)
        self.timeout_s = config.timeout_s

    def _serving(self, staged: bool) -> ServingModel | Reload | ServingAdapter:
        """A version is all weights of the model, or the adapter of an engine that was started to take one."""
        runner = self.model_runner
        if self.vllm_config.lora_config is not None:
            return ServingAdapter(runner.model.lora_manager, **self.vllm_config.additional_config["adapter"])
        return (ServingModel if staged else Reload)(runner.model, runner.model_config)

    def answer(self) -> None:
        """This worker is alive, whether it is in a group or not."""

    def begin_receive(self, version: int) -> None:
        self.staging.begin(version)

    def ready(self) -> bool:
        return self.staging.ready()

    def verify(self, version: int, digests: list[str]) -> None:
        self.staging.verify(version, digests, self.timeout_s)

    def swap(self) -> None:
        """Serve the verified version from the next step on; generation must be paused."""
        self.serving.swap(self.staging.tensors())
        self.staging.commit()

    def adapter_checksum(self) -> str:
        assert isinstance(self.serving, ServingAdapter), "the engine was started to take adapters"
        return self.serving.checksum()


def _die_with_parent() -> None:
    """Be killed when the process above ends, however it ends and even if this one is stopped; Linux alone has that."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
