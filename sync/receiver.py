"""A replica swaps to a version only after it holds every byte of it, verified; until then the old version serves.

The receiver lives in each vLLM worker process (`worker_extension_cls`) and is driven by `collective_rpc`. The engine
does not step during such a call, so none of them waits for the network:

    join_group(...)      once: the broadcast group and the layout
    begin_receive(v)     threads fill the staging buffers and build the next weights while generation goes on
    ready()              whether they are done; asked again and again until it is so
    verify(v, digests)   all buckets are here and their digests match the sender's
    swap()               generation is paused: the model goes over to the next weights
"""

from typing import Any

from sync.adapters import ServingAdapter
from sync.gloo import GlooGroup
from sync.layout import Layout
from sync.serving import ServingModel
from sync.staging import Staging


class WeightReceiver:
    """vLLM mixes this class into its worker; `model_runner` and `rank` are the worker's own."""

    model_runner: Any
    vllm_config: Any
    rank: int

    def join_group(
        self, store_host: str, store_port: int, group: str, first_rank: int, world_size: int, host: str,
        layout: str, timeout_s: float, delta: bool = False,
    ) -> None:  # fmt: skip
        """Join the broadcast group as rank `first_rank` + this worker's tensor-parallel rank, in place of any other.

        `delta` must be what the sender has.
        """
        if (old := getattr(self, "staging", None)) is not None:
            old.close()
        else:
            self.serving = self._serving()
        rank = first_rank + self.rank
        joined = GlooGroup.join(store_host, store_port, group, rank, world_size, host, timeout_s)
        self.staging = Staging(Layout.from_json(layout), joined, delta=delta, follower=self.serving)
        self.timeout_s = timeout_s

    def _serving(self) -> ServingModel | ServingAdapter:
        """What a version is: all weights of the model, or the adapter of an engine that was started to take one."""
        runner = self.model_runner
        if self.vllm_config.lora_config is None:
            return ServingModel(runner.model, runner.model_config)
        return ServingAdapter(runner.model.lora_manager, **self.vllm_config.additional_config["adapter"])

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
