"""A replica samples whole groups, tokens in and tokens out, and knows for every token which weights sampled it.

One RolloutActor owns one vLLM engine. The G rollouts of a prompt are one request, so its prefix cache holds the prompt
once. Scoring is chained here, behind the generation, so that a group costs the controller a single call: what returns
to it is a summary; the tokens stay in this node's object store until a policy rank asks for them. A group that is
interrupted returns what it has sampled instead, and any replica can go on from there.

One that shares the policy's GPUs is at rest from its start, and while the policy computes: it samples nothing, its
engine sleeps, and the next version wakes it up. Running requests are kept, their KV cache is computed again.
"""

import asyncio
import hashlib
import itertools
import json
import os
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from actors.deadline import Clock, within
from actors.errors import ReplicaDeadError
from actors.orphans import leave_none
from actors.policy import node_ip
from actors.recipe.policy import LoraConfig
from actors.recipe.rollout import GenerationConfig, RolloutConfig
from actors.sampled import INTERRUPTED, Interrupted, at_limit, continued, interrupted, unsampled
from actors.scorers import scored_by
from algorithms.types import Group, GroupSummary, Prompt, Rollout, ScoredGroup, summarize
from placement.home import check_home
from sync.adapters import adapter_request
from sync.member import Membership

_READY_FIRST_S, _READY_LAST_S, _READY_GROWTH = 0.005, 0.1, 1.5
# An abort is a message to the engine, which answers nothing; only a dead engine keeps it waiting.
_ABORT_TIMEOUT_S = 30.0
_NUM_PRIMITIVES = "2048"
"""On the CPU each shape of a matrix multiplication, so each number of tokens in a step, has code of its own, which
oneDNN writes when it is first met: 4 ms a step for the layers of a model. It keeps 1,024 of these by itself (400 MB),
fewer than steps of up to 256 sequences come to, and then writes the code of nearly every step anew."""
_WEIGHTS, _KV_CACHE = "weights", "kv_cache"
"""The parts in which vLLM's engines wake up."""


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
    lora: LoraConfig | None = None
    """The adapter that versions are of; None when they are of the whole model."""
    shares: bool = False
    """Whether it lies where the policy does."""


@dataclass(frozen=True, slots=True)
class Swapped:
    """How long a replica stood still for a version."""

    pause_s: float
    """From the pause to the resumption; running requests that are let finish first do not count."""
    swap_s: float
    """The loading of the weights, inside the pause."""
    rest_s: float = 0.0
    """Before it, the time for which the replica left its GPUs to the policy."""


@dataclass(slots=True)
class _Generation:
    """A group in the engine: once `admitted`, all of its requests are there and can be aborted together."""

    request_id: str
    """All of the group's requests bear it."""
    admitted: bool = False
    interrupted: bool = False


def _executor(settings: RolloutSettings) -> str | None:
    """Where the engine computes: None lets vLLM decide.

    On CPUs it would put its one worker into a process of its own, and each of the two spins while it waits for the
    other, on a core that the policy could have. One process does both, and is there sooner.
    """
    if not settings.use_gpu:
        return "vllm.v1.executor.uniproc_executor.UniProcExecutor"
    # This actor holds the GPUs; inside a placement group vLLM would ask Ray for others.
    return "mp" if settings.tensor_parallel_size > 1 else None


class RolloutActor:
    """One inference engine and its place in the broadcast group."""

    worker_extension = "sync.receiver.WeightReceiver"
    """The class that vLLM mixes into its workers."""

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
        self._generations: dict[tuple[int, int], _Generation] = {}  # (ordinal, attempt) -> what the engine samples now
        self._idle = asyncio.Event()
        """No group is in the engine."""
        self._idle.set()
        self._swapping = asyncio.Lock()
        self._num_fills = itertools.count()
        self._adapter: Any = None  # what a request must bear to be served with it
        self._is_staged = True
        self._stopped: float | None = None  # since when generation is paused
        self._swap_s = 0.0  # what the last swap took
        self._resting: float | None = None  # since when
        self._rest_s = 0.0  # what the last rest took
        self._has_cache = True  # False: the KV cache's memory is given up
        self._clock = Clock()
        self._dead_engine: tuple[type[Exception], ...] = ()  # what an engine raises that is dead

    async def start(self) -> str:
        """Start the engine, which serves nothing before its first committed version; the address of its machine."""
        settings = self.settings
        rollout = settings.rollout
        check_home()
        leave_none()
        os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")}
        if not settings.use_gpu:
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(rollout.cpu_kv_cache_gb)
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _NUM_PRIMITIVES)
            # Ray sets OMP_NUM_THREADS to the reserved CPUs; vLLM's worker inherits it.
            os.environ.pop("OMP_NUM_THREADS", None)
            if rollout.num_threads is not None:
                os.environ["OMP_NUM_THREADS"] = str(rollout.num_threads)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.exceptions import EngineDeadError

        from actors.model.load import load_skeleton, load_tokenizer, stop_token_ids
        from actors.model.lora import engine_arguments

        self._dead_engine = (EngineDeadError,)
        self._tokenizer = load_tokenizer(settings.model_path, settings.revision, settings.trust_remote_code)
        self._stop_token_ids = stop_token_ids(settings.model_path, self._tokenizer, settings.revision)
        generation = settings.generation
        arguments: dict[str, Any] = (
            {"gpu_memory_utilization": rollout.gpu_memory_utilization, "enable_sleep_mode": settings.shares}
            if settings.use_gpu
            else {}  # where engines cannot sleep they only stand still
        )
        if settings.lora is not None:
            skeleton = load_skeleton(settings.model_path, settings.revision, settings.trust_remote_code)
            arguments |= engine_arguments(settings.lora, skeleton)
            self._adapter = adapter_request()
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
                distributed_executor_backend=_executor(settings),
                enforce_eager=not settings.use_gpu if rollout.enforce_eager is None else rollout.enforce_eager,
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",  # after temperature: the distribution that was sampled from
                worker_extension_cls=self.worker_extension,
                disable_log_stats=True,
                **arguments,
            )
        )
        await self._come_to_rest()
        return node_ip()

    async def _come_to_rest(self) -> None:
        """A new engine on the policy's GPUs waits for its first version asleep."""
        if self.settings.shares:
            await within(_ABORT_TIMEOUT_S, self.rest(), "coming to rest")

    # Groups ------------------------------------------------------------------------------------------------------

    @ray.method(num_returns=2)
    async def fill(
        self, prompt: Prompt, attempt: int, partial: Group | None = None
    ) -> tuple[GroupSummary, ScoredGroup] | tuple[Interrupted, Group]:
        """Sample and score one group; the summary goes to the controller, the group stays here as an object.

        `partial` is what an interrupted attempt, here or on another replica, has sampled; it is continued. A group
        that is interrupted returns what it has, unscored, and says so.
        """
        started = time.perf_counter()
        rollouts = partial.rollouts if partial else (unsampled(prompt),) * self.settings.num_generations
        generating = self._generate(prompt, attempt, rollouts)
        group = await self._clock.within(self.settings.generation.timeout_s, generating, "generating a group")
        generated = time.perf_counter()
        if any(rollout.finish_reason == INTERRUPTED for rollout in group.rollouts):
            return interrupted(group, generated - started), group
        scored = await within(self.settings.score_timeout_s, self._score(group), "scoring a group")
        done = time.perf_counter()
        return summarize(scored, generate_s=generated - started, score_s=done - generated), scored

    async def interrupt(self, ordinals: list[tuple[int, int]] | None) -> None:
        """The named groups (ordinal, attempt), or all, sample no further token: their `fill` returns what they have.

        Groups that are past generation, and those that this replica does not know, are left alone.
        """
        keys = list(self._generations) if ordinals is None else ordinals
        generations = [self._generations[key] for key in map(tuple, keys) if key in self._generations]
        for generation in generations:
            generation.interrupted = True
        await self._abort(generation.request_id for generation in generations if generation.admitted)

    async def _abort(self, request_ids: Iterable[str]) -> None:
        """Every unfinished request of these ids ends now, with the tokens that it has."""
        await within(_ABORT_TIMEOUT_S, self.engine.abort(list(request_ids)), "aborting requests")

    async def _generate(self, prompt: Prompt, attempt: int, rollouts: Sequence[Rollout]) -> Group:
        """The group with each rollout at its end, or as far as it got when the group is interrupted."""
        assert self.version is not None, "a replica serves no token before it holds a committed version"
        key = prompt.ordinal, attempt
        assert key not in self._generations, "an attempt is on a replica once"
        generation = _Generation(f"{prompt.ordinal}.{attempt}.{next(self._num_fills)}")
        self._generations[key] = generation
        self._idle.clear()
        try:
            return Group(prompt, await self._sample(generation, rollouts), attempt, self.replica)
        except self._dead_engine as error:
            raise ReplicaDeadError(f"the engine of rollout replica {self.replica} died") from error
        finally:
            del self._generations[key]
            # No request outlives its group when one of them failed, or the deadline passed; else this does nothing.
            await self._abort([generation.request_id])
            if not self._generations:
                self._idle.set()

    async def _sample(self, generation: _Generation, rollouts: Sequence[Rollout]) -> tuple[Rollout, ...]:
        """Every unfinished rollout goes on from its last token; rollouts at the same tokens are one request."""
        limit = self.settings.generation.max_completion_length
        done = [at_limit(rollout, limit) for rollout in rollouts]
        alike: dict[tuple[int, ...], list[int]] = {}
        for index, rollout in enumerate(done):
            if rollout.finish_reason == INTERRUPTED:
                alike.setdefault(tuple(rollout.token_ids_T.tolist()), []).append(index)
        collectors = []
        for token_ids, indices in alike.items():
            sampling = self._sampling(len(indices), limit - done[indices[0]].num_loss_tokens)
            # Only the rollouts of one group share their prefix, and only here and now: another group's, or the same
            # group's on an earlier visit, may come from other weights.
            request: Any = {"prompt_token_ids": list(token_ids), "cache_salt": generation.request_id}
            # Not engine.generate: it does not say when the engine knows the request, and no earlier abort counts.
            collectors.append(
                await self.engine.add_request(generation.request_id, request, sampling, lora_request=self._adapter)
            )
        generation.admitted = True
        if generation.interrupted:
            await self._abort([generation.request_id])
        for collector, indices in zip(collectors, alike.values(), strict=True):
            output: Any = await collector.get()
            assert output.finished, "vLLM sends nothing before the final output"
            for index, completion in zip(indices, output.outputs, strict=True):
                done[index] = continued(done[index], completion)
        return tuple(done)

    async def _score(self, group: Group) -> ScoredGroup:
        ordinal = group.prompt.ordinal
        if self._references:
            group = await scored_by(self._references[ordinal % len(self._references)], group)
        texts = [self._tokenizer.decode(r.completion_ids, skip_special_tokens=True) for r in group.rollouts]
        scored: ScoredGroup = await scored_by(self._rewards[ordinal % len(self._rewards)], group, texts)
        return scored

    @staticmethod
    async def _final(outputs: AsyncIterator[Any]) -> Any:
        """The finished request; vLLM sends nothing before it."""
        *_, last = [output async for output in outputs]
        assert last.finished, "a generation ends with its final output"
        return last

    def _sampling(self, num_rollouts: int, max_tokens: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        generation = self.settings.generation
        return SamplingParams(
            n=num_rollouts,
            temperature=generation.temperature,
            top_p=generation.top_p,
            top_k=generation.top_k,
            max_tokens=max_tokens,
            stop_token_ids=self._stop_token_ids,
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    # Weights -----------------------------------------------------------------------------------------------------

    async def join_weights(self, first: Membership) -> None:
        """Join the broadcast group, this replica's workers as rank `first.rank` and those behind it.

        Returns when all members have joined.
        """
        self._is_staged = first.config.staging != "none"
        joining = self.engine.collective_rpc("join_group", args=(first.model_dump_json(), node_ip()))
        await within(first.config.timeout_s, joining, "joining the weight group")

    async def forget(self) -> None:
        """What is being sampled ends now, and nothing is served before a version comes; the engine stays."""
        await self.interrupt(None)
        await within(_ABORT_TIMEOUT_S, self._idle.wait(), "ending what is being sampled")
        await within(_ABORT_TIMEOUT_S, self._swapping.acquire(), "ending a swap")
        self.version = None
        self._swapping.release()

    async def ping(self) -> None:
        """The engine and its workers answer."""
        await self.engine.collective_rpc("answer")

    async def begin_receive(self, version: int) -> None:
        """Receive `version`: into staging while generation goes on, or into the model, which stands still from now."""
        if self.version is not None and version <= self.version:
            raise RuntimeError(
                f"replica {self.replica} holds version {self.version}; versions never go back to {version}"
            )
        if not self._is_staged:
            async with self._swapping:
                await self._pause()
        await self.engine.collective_rpc("begin_receive", args=(version,))

    async def receive(self, version: int, timeout_s: float) -> None:
        """Returns when everything that was sent is here, or a worker knows that it will not be."""
        await within(timeout_s, received(self.engine), f"receiving version {version}")

    async def verify(self, version: int, digests: tuple[str, ...]) -> None:
        """Every worker of this replica holds `version` whole."""
        await self.engine.collective_rpc("verify", args=(version, list(digests)))

    async def swap(self, version: int, timeout_s: float, hold: bool) -> Swapped | None:
        """Serve `version` from the next token on; without in-flight updates, once the running requests are done.

        With `hold` no token is sampled before `resume_generation`.
        """
        swapping = self._swap(version, hold)
        return await within(timeout_s, swapping, f"swapping replica {self.replica} to version {version}")

    async def _swap(self, version: int, hold: bool) -> Swapped | None:
        async with self._swapping:
            await self._pause()
            loading = time.perf_counter()
            await self.engine.collective_rpc("swap")
            await self.engine.update_weight_version(str(version))
            self.version = version
            self._swap_s = time.perf_counter() - loading
            return None if hold else await self.resume_generation()

    async def resume_generation(self) -> Swapped:
        """Go on sampling after a swap."""
        if self._has_cache:
            await self.engine.resume_generation()
        else:
            resumed = await self.engine.wake_up([_KV_CACHE])
            assert resumed, "vLLM goes on by itself when all of its memory is there again"
            self._has_cache = True
        self._clock.start()
        stopped, self._stopped = self._stopped, None
        assert stopped is not None, "it was paused"
        rest_s, self._rest_s = self._rest_s, 0.0
        return Swapped(pause_s=time.perf_counter() - stopped, swap_s=self._swap_s, rest_s=rest_s)

    async def rest(self) -> None:
        """From here on no token is sampled, and the GPUs are the policy's, until a version is swapped in.

        Running requests are kept, or finish first without in-flight updates. Of weights that every version brings
        nothing is kept; those below an adapter wait in the host's memory.
        """
        async with self._swapping:
            if self._resting is not None:
                return
            settings = self.settings
            level = 2 if settings.lora is None else 1
            await self.engine.sleep(level=level, mode="keep" if settings.in_flight_updates else "wait")
            self._clock.stop()
            self._resting, self._stopped, self._has_cache = time.perf_counter(), None, False

    async def _rise(self, since: float) -> None:
        """Make room for weights again; the KV cache comes when they are there, and sampling with it."""
        await self.engine.wake_up([_WEIGHTS])
        self._stopped, self._resting = time.perf_counter(), None
        self._rest_s = self._stopped - since

    async def _pause(self) -> None:
        """No token is sampled from here on; running requests are kept, or finish first without in-flight updates."""
        if self._resting is not None:
            await self._rise(self._resting)
        if self._stopped is not None:
            return  # for a version that did not come whole, or since the policy computes
        settings = self.settings
        started = time.perf_counter()
        await self.engine.pause_generation(
            mode="keep" if settings.in_flight_updates else "wait",
            clear_cache=settings.recompute_kv_cache or not settings.in_flight_updates,
        )
        self._stopped = started if settings.in_flight_updates else time.perf_counter()

    async def checksum(self) -> str:
        """Equal on replicas whose weights are equal; the engine stands still meanwhile."""
        by_worker: list[Any] = list(await self.engine.compute_weight_checksums())
        if self._adapter is not None:
            by_worker += await self.engine.collective_rpc("adapter_checksum")
        return hashlib.sha256(json.dumps(by_worker, sort_keys=True).encode()).hexdigest()

    async def score_tokens(self, token_ids: list[int]) -> list[float]:
        """Log-probability of every token but the first under the weights that serve now; for checks."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=1, temperature=self.settings.generation.temperature, prompt_logprobs=0, detokenize=False
        )
        request: Any = {"prompt_token_ids": token_ids, "cache_salt": f"check-{time.time_ns()}"}
        outputs = self.engine.generate(request, sampling, f"check-{time.time_ns()}", lora_request=self._adapter)
        output = await within(self.settings.generation.timeout_s, self._final(outputs), "scoring tokens")
        scores = zip(token_ids[1:], output.prompt_logprobs[1:], strict=True)
        return [entry[token].logprob for token, entry in scores]

    async def close(self) -> None:
        """Stop the engine and its processes."""
        await asyncio.to_thread(self.engine.shutdown)


async def received(engine: Any) -> None:
    """Returns when the engine's workers have what they are being sent, or know that they will not.

    The engine stands still during a call to its workers, so they are asked, ever more rarely, and not waited for.
    """
    pause_s = _READY_FIRST_S
    while not all(await engine.collective_rpc("ready")):
        await asyncio.sleep(pause_s)
        pause_s = min(_READY_LAST_S, pause_s * _READY_GROWTH)
