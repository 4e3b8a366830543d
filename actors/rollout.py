"""A replica samples whole groups, tokens in and tokens out, and knows for every token which weights sampled it.

One RolloutActor owns one vLLM engine. The G rollouts of a prompt are one request, so its prefix cache holds the prompt
once. Scoring is chained here, behind the generation, so that a group costs the controller a single call: what returns
to it is a summary; the tokens stay in this node's object store until a policy rank asks for them.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from actors.deadline import within
from actors.errors import ReplicaDeadError
from actors.policy import node_ip
from actors.recipe.schema import GenerationConfig, RolloutConfig
from algorithms.types import Group, GroupSummary, Prompt, Rollout, ScoredGroup, VersionSpan, summarize


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """All that a replica needs to know; the same on every replica."""

    model_path: str
    revision: str | None
    trust_remote_code: bool
    num_generations: int
    generation: GenerationConfig
    rollout: RolloutConfig
    tensor_parallel_size: int
    use_gpu: bool
    seed: int
    score_timeout_s: float
    """Deadline of one group's reference and rewards, the queue at the workers included."""
    in_flight_updates: bool
    recompute_kv_cache: bool


@dataclass(frozen=True, slots=True)
class Swapped:
    """How long a replica stood still for a version."""

    pause_s: float
    """From the pause to the resumption; running requests that are let finish first do not count."""
    swap_s: float
    """The loading of the weights, inside the pause."""


class RolloutActor:
    """One inference engine and its place in the broadcast group."""

    def __init__(
        self,
        replica: int,
        settings: RolloutSettings,
        rewards: list[ray.actor.ActorHandle],
        references: list[ray.actor.ActorHandle],
    ) -> None:
        self.replica = replica
        self.settings = settings
        self.version: int | None = None
        self._rewards = rewards
        self._references = references

    async def start(self) -> None:
        """Start the engine; it serves nothing before its first committed version."""
        settings = self.settings
        rollout = settings.rollout
        os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")}
        if not settings.use_gpu:
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(rollout.cpu_kv_cache_gb)
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            # Ray sets OMP_NUM_THREADS to the reserved CPUs; vLLM's worker inherits it.
            os.environ.pop("OMP_NUM_THREADS", None)
            if rollout.num_threads is not None:
                os.environ["OMP_NUM_THREADS"] = str(rollout.num_threads)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from actors.model.load import load_tokenizer, stop_token_ids

        self._tokenizer = load_tokenizer(settings.model_path, settings.revision, settings.trust_remote_code)
        self._stop_token_ids = stop_token_ids(settings.model_path, self._tokenizer, settings.revision)
        generation = settings.generation
        arguments: dict[str, Any] = (
            {"gpu_memory_utilization": rollout.gpu_memory_utilization} if settings.use_gpu else {}
        )
        self.engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=settings.model_path,
                revision=settings.revision,
                trust_remote_code=settings.trust_remote_code,
                skip_tokenizer_init=True,  # tokens in, tokens out
                dtype=rollout.dtype,
                seed=settings.seed + self.replica,
                max_model_len=generation.max_prompt_length + generation.max_completion_length,
                max_num_seqs=rollout.max_num_seqs,
                tensor_parallel_size=settings.tensor_parallel_size,
                # This actor holds the GPUs; inside a placement group vLLM would ask Ray for others.
                distributed_executor_backend="mp" if settings.tensor_parallel_size > 1 else None,
                enforce_eager=not settings.use_gpu if rollout.enforce_eager is None else rollout.enforce_eager,
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",  # after temperature: the distribution that was sampled from
                worker_extension_cls="sync.receiver.WeightReceiver",
                disable_log_stats=True,
                **arguments,
            )
        )

    # Groups ------------------------------------------------------------------------------------------------------

    @ray.method(num_returns=2)
    async def fill(self, prompt: Prompt, attempt: int) -> tuple[GroupSummary, ScoredGroup]:
        """Sample and score one group; the summary goes to the controller, the group stays here as an object."""
        started = time.perf_counter()
        group = await within(self.settings.generation.timeout_s, self._generate(prompt, attempt), "generating a group")
        generated = time.perf_counter()
        scored = await within(self.settings.score_timeout_s, self._score(group), "scoring a group")
        done = time.perf_counter()
        return summarize(scored, generate_s=generated - started, score_s=done - generated), scored

    async def _generate(self, prompt: Prompt, attempt: int) -> Group:
        assert self.version is not None, "a replica serves no token before it holds a committed version"
        request: Any = {
            "prompt_token_ids": list(prompt.token_ids),
            # Only the rollouts of one prompt share their prefix: another group's may come from other weights.
            "cache_salt": f"{prompt.ordinal}.{attempt}",
        }
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            output = await self._final(self.engine.generate(request, self._sampling(), f"{prompt.ordinal}.{attempt}"))
        except EngineDeadError as error:
            raise ReplicaDeadError(f"the engine of rollout replica {self.replica} died") from error
        rollouts = tuple(_rollout(prompt, completion) for completion in output.outputs)
        return Group(prompt, rollouts, attempt, self.replica)

    async def _score(self, group: Group) -> ScoredGroup:
        ordinal = group.prompt.ordinal
        if self._references:
            group = await self._references[ordinal % len(self._references)].score.remote(group)
        texts = [self._tokenizer.decode(r.completion_ids, skip_special_tokens=True) for r in group.rollouts]
        scored: ScoredGroup = await self._rewards[ordinal % len(self._rewards)].score.remote(group, texts)
        return scored

    @staticmethod
    async def _final(outputs: AsyncIterator[Any]) -> Any:
        """The finished request; vLLM sends nothing before it."""
        *_, last = [output async for output in outputs]
        assert last.finished, "a generation ends with its final output"
        return last

    def _sampling(self) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        generation = self.settings.generation
        return SamplingParams(
            n=self.settings.num_generations,
            temperature=generation.temperature,
            top_p=generation.top_p,
            top_k=generation.top_k,
            max_tokens=generation.max_completion_length,
            stop_token_ids=self._stop_token_ids,
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    # Weights -----------------------------------------------------------------------------------------------------

    async def join_weights(
        self, store: tuple[str, int], group: str, world_size: int, layout: str, timeout_s: float
    ) -> None:
        """Take this replica's ranks in the broadcast group; returns when all members have joined."""
        first_rank = 1 + self.replica * self.settings.tensor_parallel_size
        arguments = (*store, group, first_rank, world_size, node_ip(), layout, timeout_s)
        await within(timeout_s, self.engine.collective_rpc("join_group", args=arguments), "joining the weight group")

    async def begin_receive(self, version: int) -> None:
        """Receive `version` into staging while generation goes on."""
        if self.version is not None and version <= self.version:
            raise RuntimeError(
                f"replica {self.replica} holds version {self.version}; versions never go back to {version}"
            )
        await self.engine.collective_rpc("begin_receive", args=(version,))

    async def verify(self, version: int, digests: tuple[str, ...]) -> None:
        """Every worker of this replica holds `version` whole."""
        await self.engine.collective_rpc("verify", args=(version, list(digests)))

    async def swap(self, version: int, timeout_s: float) -> Swapped:
        """Serve `version` from the next token on; without in-flight updates, once the running requests are done."""
        if not self.settings.in_flight_updates:
            timeout_s += self.settings.generation.timeout_s
        return await within(timeout_s, self._swap(version), f"swapping replica {self.replica} to version {version}")

    async def _swap(self, version: int) -> Swapped:
        settings = self.settings
        started = time.perf_counter()
        await self.engine.pause_generation(
            mode="keep" if settings.in_flight_updates else "wait",
            clear_cache=settings.recompute_kv_cache or not settings.in_flight_updates,
        )
        paused = time.perf_counter()
        await self.engine.collective_rpc("swap")
        await self.engine.update_weight_version(str(version))
        self.version = version
        swapped = time.perf_counter()
        await self.engine.resume_generation()
        stopped = started if settings.in_flight_updates else paused
        return Swapped(pause_s=time.perf_counter() - stopped, swap_s=swapped - paused)

    async def score_tokens(self, token_ids: list[int]) -> list[float]:
        """Log-probability of every token but the first under the weights that serve now; for checks."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=1, temperature=self.settings.generation.temperature, prompt_logprobs=0, detokenize=False
        )
        request: Any = {"prompt_token_ids": token_ids, "cache_salt": f"check-{time.time_ns()}"}
        output = await self._final(self.engine.generate(request, sampling, f"check-{time.time_ns()}"))
        scores = zip(token_ids[1:], output.prompt_logprobs[1:], strict=True)
        return [entry[token].logprob for token, entry in scores]

    async def close(self) -> None:
        """Stop the engine and its processes."""
        await asyncio.to_thread(self.engine.shutdown)


def _rollout(prompt: Prompt, completion: Any) -> Rollout:
    """vLLM's completion as a rollout: arrays over prompt and completion."""
    num_prompt, num_sampled = len(prompt.token_ids), len(completion.token_ids)
    token_ids_T = np.fromiter((*prompt.token_ids, *completion.token_ids), np.int32)
    logprobs_T = np.zeros(num_prompt + num_sampled, np.float32)
    pairs = zip(completion.token_ids, completion.logprobs, strict=True)
    logprobs_T[num_prompt:] = [entry[token].logprob for token, entry in pairs]
    spans = tuple(
        VersionSpan(int(span.version), num_prompt + span.start, num_prompt + span.end)
        for span in completion.weight_versions
    )
    assert sum(span.stop - span.start for span in spans) == num_sampled, "every sampled token has a version"
    return Rollout(
        token_ids_T=token_ids_T,
        loss_mask_T=np.arange(num_prompt + num_sampled) >= num_prompt,
        logprobs_T=logprobs_T,
        spans=spans,
        finish_reason=str(completion.finish_reason),
    )
