"""Rollout actors that can be struck anywhere: one with an engine that takes next to nothing, and one with vLLM's.

The light one is `RolloutActor` in everything but its engine, which holds weights, samples by their digest, and can be
paused, aborted and swapped under running requests as vLLM's can.
"""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import ray
from torch import Tensor

from actors.policy import node_ip
from actors.rollout import RolloutActor
from actors.sampled import Interrupted
from algorithms.types import Group, GroupSummary, Prompt, ScoredGroup
from sync.receiver import WeightReceiver
from sync.staging import CPU
from tests.chaos.faults import note_start, policy_computes, report, strike
from tests.chaos.tokens import next_token, text_of, weights_digest
from tests.chaos.wire import ChaosWire

_TOKEN_S = 0.004


class ChaosReceiver(WeightReceiver):
    """A worker's side of a publication, struck in its phases."""

    def join_group(self, first: str, host: str) -> None:
        strike("rollout", "join")
        super().join_group(first, host)

    def begin_receive(self, version: int) -> None:
        strike("rollout", "announce")
        if not isinstance(self.staging._group, ChaosWire):
            wire: Any = ChaosWire(self.staging._group, "rollout")
            self.staging._group = wire
        super().begin_receive(version)

    def verify(self, version: int, digests: list[str]) -> None:
        strike("rollout", "verify")
        super().verify(version, digests)

    def swap(self) -> None:
        action = strike("rollout", "swap")
        super().swap()
        if action == "spoil":
            self.spoil()

    def spoil(self) -> None:
        """Change one weight, after all digests were found right."""
        parameter = next(iter(self.model_runner.model.parameters()))
        parameter.data.view(-1)[0] += 1.0


class LightServing:
    """The weights that a light engine samples by."""

    def __init__(self) -> None:
        self.model: dict[str, Tensor] = {}
        self.digest = ""

    def begin(self) -> None:
        """Nothing is built beforehand."""

    def arrived(self, tensors: dict[str, Tensor]) -> None:
        """They are taken at the swap."""

    def swap(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.model = {name: tensor.clone() for name, tensor in tensors}
        self.digest = weights_digest(self.model)


class LightWorker(ChaosReceiver):
    """vLLM's worker without a model."""

    def __init__(self) -> None:
        self.rank = 0
        self.device = CPU
        self.serving = LightServing()

    def _serving(self, staged: bool) -> Any:
        return self.serving

    def spoil(self) -> None:
        next(iter(self.serving.model.values()))[0, 0] += 1.0
        self.serving.digest = weights_digest(self.serving.model)


@dataclass(slots=True, eq=False)
class _Request:
    """Rollouts at the same tokens, which go on together."""

    request_id: str
    prompt: list[int]
    limit: int
    sampled: list[list[int]]
    labels: list[list[int]]
    reasons: list[str | None]
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    async def get(self) -> Any:
        await self.done
        return SimpleNamespace(finished=True, outputs=[self._output(place) for place in range(len(self.sampled))])

    def _output(self, place: int) -> Any:
        token_ids, labels = self.sampled[place], self.labels[place]
        return SimpleNamespace(
            token_ids=token_ids,
            logprobs=SimpleNamespace(token_ids=[*token_ids], logprobs=[-1.0] * len(token_ids)),
            weight_versions=[SimpleNamespace(version=v, start=at, end=at + 1) for at, v in enumerate(labels)],
            finish_reason=self.reasons[place],
        )


class LightEngine:
    """The calls of vLLM's AsyncLLM that a RolloutActor makes."""

    def __init__(self, seed: int, shares: bool = False) -> None:
        self.worker = LightWorker()
        self._shares = shares
        self._seed = seed
        self._version = -1
        self._requests: set[_Request] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._one_call = asyncio.Lock()
        self._asleep: set[str] = set()

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        assert method != "swap" or "weights" not in self._asleep, "there is no memory to load weights into"
        async with self._one_call:  # as vLLM's worker takes them
            return [await asyncio.to_thread(getattr(self.worker, method), *args)]

    async def add_request(
        self, request_id: str, request: Mapping[str, Any], sampling: Any, lora_request: Any
    ) -> _Request:
        num = sampling.n
        made = _Request(
            request_id,
            list(request["prompt_token_ids"]),
            sampling.max_tokens,
            [[] for _ in range(num)],
            [[] for _ in range(num)],
            [None] * num,
        )
        task = asyncio.create_task(self._run(made))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._requests.add(made)
        return made

    async def _run(self, request: _Request) -> None:
        while not request.done.done():
            await self._flowing.wait()
            try:
                self._step(request)
            except Exception as error:  # noqa: BLE001  whoever waits for the request is to know
                if not request.done.done():
                    request.done.set_exception(error)
                return
            await asyncio.sleep(_TOKEN_S)

    def _step(self, request: _Request) -> None:
        """One token for each rollout that has not ended."""
        for place, reason in enumerate(request.reasons):
            if reason is None:
                self._sample(request, place)
        if None not in request.reasons:
            self._finish(request)

    def _sample(self, request: _Request, place: int) -> None:
        tokens = request.sampled[place]
        if self._shares and policy_computes():
            report(f"tokens 1 request {request.request_id}: sampled while the policy computes on the same GPUs")
        token, ends = next_token(self.worker.serving.digest, self._seed, [*request.prompt, *tokens], place)
        tokens.append(token)
        request.labels[place].append(self._version)
        if ends:
            request.reasons[place] = "stop"
        elif len(tokens) >= request.limit:
            request.reasons[place] = "length"

    def _finish(self, request: _Request) -> None:
        self._requests.discard(request)
        if not request.done.done():
            request.done.set_result(None)

    async def abort(self, request_ids: list[str]) -> None:
        for request in [request for request in self._requests if request.request_id in request_ids]:
            request.reasons = [reason or "abort" for reason in request.reasons]
            self._finish(request)

    async def pause_generation(self, mode: str, clear_cache: bool) -> None:
        if mode == "wait":
            while self._requests:  # noqa: ASYNC110  as long as they take
                await asyncio.sleep(_TOKEN_S)
        self._flowing.clear()

    async def resume_generation(self) -> None:
        assert not self._asleep, "it sleeps"
        self._flowing.set()

    async def sleep(self, level: int, mode: str) -> None:
        await self.pause_generation(mode, clear_cache=True)
        self._asleep = {"weights", "kv_cache"}
        assert level == 2, "every version brings all weights"
        self.worker.serving.model, self.worker.serving.digest = {}, ""

    async def wake_up(self, tags: list[str]) -> bool:
        strike("rollout", "wake")
        assert self._asleep >= {*tags}
        self._asleep -= {*tags}
        if not self._asleep:
            self._flowing.set()
        return not self._asleep

    async def update_weight_version(self, version: str) -> None:
        self._version = int(version)

    async def compute_weight_checksums(self) -> list[str]:
        return [weights_digest(self.worker.serving.model)]

    def shutdown(self) -> None:
        for task in self._tasks:
            task.get_loop().call_soon_threadsafe(task.cancel)


class _Words:
    """The tokenizer that a RolloutActor needs."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return text_of(token_ids)


class LightRollout(RolloutActor):
    """A replica that is there within a second or two."""

    async def start(self) -> str:
        strike("rollout", "start")
        tokenizer: Any = _Words()
        engine: Any = LightEngine(self.settings.seed, self.settings.shares)
        self._tokenizer = tokenizer
        self.engine = engine
        await self._come_to_rest()
        note_start(self.replica)
        return node_ip()

    @ray.method(num_returns=2)
    async def fill(
        self, prompt: Prompt, attempt: int, partial: Group | None = None
    ) -> tuple[GroupSummary, ScoredGroup] | tuple[Interrupted, Group]:
        strike("rollout", "fill")
        return await super().fill(prompt, attempt, partial)

    async def _score(self, group: Group) -> ScoredGroup:
        strike("rollout", "score")
        return await super()._score(group)

    def _sampling(self, num_rollouts: int, max_tokens: int) -> Any:
        return SimpleNamespace(n=num_rollouts, max_tokens=max_tokens)

    async def ping(self) -> None:
        strike("rollout", "idle" if self._resting is None else "rest")
        await super().ping()

    async def rest(self) -> None:
        if self.version is not None:  # else it is new
            strike("rollout", "sleep")
        await super().rest()


class VllmRollout(RolloutActor):
    """The real engine, struck in its worker and in its actor."""

    worker_extension = "tests.chaos.replica.ChaosReceiver"

    @ray.method(num_returns=2)
    async def fill(
        self, prompt: Prompt, attempt: int, partial: Group | None = None
    ) -> tuple[GroupSummary, ScoredGroup] | tuple[Interrupted, Group]:
        strike("rollout", "fill")
        return await super().fill(prompt, attempt, partial)

    async def _score(self, group: Group) -> ScoredGroup:
        strike("rollout", "score")
        return await super()._score(group)
