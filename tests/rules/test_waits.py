"""No wait in the product is without a deadline: its own, or one further out that this list names."""

from collections import Counter
from fnmatch import fnmatchcase

import pytest

from tests.rules.product import sources
from tests.rules.waits import coroutines, waits_without_deadline

PHASE = "the publisher keeps the deadline of every phase, fences a replica that is late, and ends its processes"
GROUP = "`fill` gives generation, and then scoring, its deadline"
TAKEN = "held over a change of state alone, in which nothing is waited for"
OWN_WIRE = "the wire's own deadline ends the broadcast; the rest is copying and hashing"
MET = "the ranks' process group has a time limit (_meet), and the controller's deadline of the call comes before it"
WIRE = "a wire of ours: it keeps a deadline for every operation"
IDLE = "there is nothing to do until somebody asks; it is cancelled with the run"

# file: function: the wait itself -> why it ends. `*` stands for any text.
ALLOWED = {
    "actors/controller.py: Controller.run: self.publisher.exclusive": "nothing else runs yet",
    "actors/controller.py: Controller.learn: await self.stopped(version)": "Checkpointer.last: deadlines inside",
    "actors/controller.py: Controller.learn: self.publisher.exclusive": "held over an admission: deadlines inside",
    "actors/controller.py: Controller.learn: await self.settled(update.version)": "Checkpointer.after: the same",
    "actors/controller.py: Controller.learn: await self.health(update.version, metrics)": "Health.after: the same",
    "actors/fleet.py: Fleet.wait_for: await self._changed.wait()": "its caller gives the deadline, or is idle",
    "actors/fleet.py: Fleet._build: *.building()": "held over a step: deadlines inside",
    "actors/turns.py: Turns.until: await self._changed.wait()": "whoever has the turn keeps deadlines of his own",
    "actors/checkpoint/checkpointer.py: Checkpointer.after: *self.turns.computing()": "no engine is built just now",
    "actors/critic_group.py: CriticGroup.*: self.turn()": "engines that are built have deadlines of their own",
    "actors/router.py: Router.emptied: await self._freed.wait()": "its caller gives the deadline",
    "actors/elastic.py: Elastic._run: True": IDLE,
    "actors/fleet.py: Fleet._supervise: await self._to_rebuild.get()": IDLE,
    "actors/pacer.py: AsyncPacer._change: self._changed": TAKEN,
    "actors/pacer.py: AsyncPacer.look_again: self._changed": TAKEN,
    "actors/pacer.py: AsyncPacer._wait: self._changed": TAKEN,
    "actors/pacer.py: AsyncPacer._stalled: await self.on_stall(reason)": "Watchdog.idle: deadlines inside",
    "actors/apart.py: apart: asyncio.create_task(work)": "the work keeps its own deadlines",
    "actors/apart.py: apart: await asyncio.wait({task})": "the same",
    "actors/apart.py: apart: task.result()": "it is done",
    "actors/apart.py: apart: task.exception()": "it is done",
    "actors/run/grpo.py: Lives._renewed: started.result()": "its task group has ended, so it is done",
    "actors/run/recovery.py: Recovery._next: await self.lived(*": "a life: deadlines inside",
    "actors/run/recovery.py: Recovery._recovered: await self.renewed()": "Ranks.start and Fleet.forget: the same",
    "actors/run/sight.py: suspected: await looks(reason)": "Watchdog._look and Lives._look: the same",
    "actors/run/life.py: Life.live: self.ledger": "no lock: it closes a file",
    "actors/controller.py: Controller._step: learning.result()": "its task group has ended, so it is done",
    "actors/workers.py: grpo_workers: learners.result()": "the same",
    "actors/workers.py: Workers.learners: *.result()": "the same",
    "actors/fleet.py: Fleet._watch: True": IDLE,
    "actors/run/machine.py: _watch_machine: True": IDLE,
    "actors/run/machine.py: _watch_raylet: await ended.wait()": IDLE,
    "actors/deaths.py: sign_of_life: *": "its callers give it its deadline",
    "actors/scorers.py: _ping: *": "`_watch` gives it its deadline",
    "actors/policy.py: PolicyActor._is_true_anywhere: torch.distributed.all_reduce(*": MET,
    "actors/policy_state.py: _random_states: torch.distributed.all_gather(*": MET,
    "actors/host_copy.py: HostCopies.finish: *": "its threads copy memory, which takes as long as it takes",
    "actors/policy.py: PolicyActor._whole: whole": "a gather of ZeRO-3: the controller's deadline of the call",
    "deploy/doctor/cluster.py: _live: ended.wait()": "it keeps Ray's processes until the command ends",
    "deploy/doctor/gpus.py: _wire: group.broadcast(*": WIRE,
    "actors/deadline.py: aside: await asyncio.wrap_future(answer)": "made for `within`, and lint asks callers for it",
    "actors/publisher.py: Publisher._admit: self.exclusive": "held over a step and a publication: deadlines inside",
    "actors/publisher.py: _first_failure: *": "it watches while `_stream` waits with a deadline, and is cancelled then",
    "actors/publisher.py: _answer: await call": "only makes a coroutine of Ray's reference, for `within`",
    "actors/model/team.py: _exchanged: dist.all_to_all_single(*": MET,
    "actors/model/team.py: _Whole.forward: dist.all_reduce(*": MET,
    "actors/reward.py: RewardActor.check: *": "Lane: every load and call has its deadline; the caller has one too",
    "actors/reward.py: RewardActor._loaded: *": "the same",
    "actors/reward.py: RewardActor._outcomes: *": "the same",
    "actors/rewards/child.py: _gathered*": "the parent kills the child at the deadline of the call",
    "actors/rewards/together.py: _output: await function(*": "the parent has it cut off, or kills the child",
    "actors/rewards/together.py: _output_of: task.result()": "it is done",
    "actors/rewards/judge.py: as_reward.asked: await judge(*": "the same: it runs in the child",
    "actors/rewards/pipe.py: *: select.poll()": "no wait: it makes the poller",
    "actors/rewards/pipe.py: _wait: poller.poll()": "a child waits for its parent; it ends with it (EOF, and a signal)",
    "actors/rollout.py: RolloutActor._sample: *": GROUP,
    "actors/scorers.py: scored_by: *": GROUP,
    "actors/rollout.py: RolloutActor._final: outputs": "`score_tokens` gives it its deadline",
    "actors/rollout.py: RolloutActor.ping: *": PHASE,
    "actors/rollout.py: RolloutActor.begin_receive: *": PHASE,
    "actors/rollout.py: RolloutActor.verify: *": PHASE,
    "actors/rollout.py: RolloutActor._swap: *": "`swap` gives it its deadline",
    "actors/rollout.py: RolloutActor._pause: *": PHASE,
    "actors/rollout.py: RolloutActor._rise: *": PHASE,
    "actors/rollout.py: RolloutActor.resume_generation: *": PHASE,
    "actors/rollout.py: RolloutActor.rest: *": "Fleet.resting gives it its deadline, fences a replica that is late",
    "actors/rollout.py: RolloutActor.checksum: *": PHASE,
    "actors/rollout.py: RolloutActor.close: *": "Fleet._end gives it 10 s and kills the actor",
    "actors/rollout.py: received: *": "`receive` gives it its deadline",
    "actors/router.py: Router.dispatch: await self._freed.wait()": "Attempts.make gives it its deadline",
    "actors/workers.py: _close: *": "its gather is awaited in the next line, with a deadline",
    "sync/adapters.py: ServingAdapter.*: self._building": TAKEN,
    "sync/serving.py: ServingModel.*: self._building": TAKEN,
    "sync/relay.py: RelayGroup.*: self._changed": TAKEN,
    "sync/relay.py: RelayGroup.close: self._threads.shutdown()": "links under way were aborted just before",
    "sync/relay.py: RelayGroup._move: link.wire.broadcast(part)": WIRE,
    "sync/staging.py: Staging._take: self._group.broadcast(*": WIRE,
    "sync/gloo.py: GlooGroup._start: self._group.broadcast(*": "not waited for here; its options have the deadline",
    "sync/gloo.py: _Sliced.wait: self._done.result(*": "given no limit only when it is done (`_done_within`)",
    "sync/gloo.py: _free_when_done: *": "a daemon thread that keeps what gloo may still write to",
    "sync/gloo.py: _done_within: work.wait()": "the operation is complete: this raises what went wrong",
    "sync/nccl.py: NcclGroup._join.make: *": "made on a thread that `within` waits for with a deadline",
    "sync/nccl.py: NcclGroup._attempt: *": "the watchdog sets `_failure` at the deadline",
    "sync/sender.py: Sender._stream: wire": OWN_WIRE,
    "sync/sender.py: Sender._stream: digester": OWN_WIRE,
    "sync/sender.py: Sender._stream: future.result()": OWN_WIRE,
    "sync/sender.py: _Slot.landed: future.exception()": OWN_WIRE,
    "sync/staging.py: Staging.ready: *": "it is done: this takes the result",
    "sync/staging.py: Staging.close: *": "copying alone; queued work is cancelled",
    "sync/staging.py: Staging._let_go: *": "hashing and copying alone",
    "sync/staging.py: _on_one_core: *": "the thread has nothing else to do",
    "sync/transport.py: within: answer.result()": "it cannot be cancelled any more, so it is done",
}  # fmt: skip


def found() -> Counter[str]:
    product = sources()
    ours = coroutines(product.values())
    return Counter(
        f"{path}: {wait.function}: {wait.text}"
        for path, source in product.items()
        for wait in waits_without_deadline(source, ours)
    )


def test_every_wait_has_a_deadline_or_a_reason() -> None:
    unknown = [wait for wait in found() if not any(fnmatchcase(wait, escaped(entry)) for entry in ALLOWED)]
    assert not unknown, "waits without a deadline; put `within(...)` around them:\n" + "\n".join(unknown)


def test_every_reason_is_still_needed() -> None:
    waits = list(found())
    stale = [entry for entry in ALLOWED if not any(fnmatchcase(wait, escaped(entry)) for wait in waits)]
    assert not stale, "these excuse nothing any more; delete them:\n" + "\n".join(stale)


def escaped(entry: str) -> str:
    """Only `*` means more than itself."""
    return entry.replace("[", "[[]").replace("?", "[?]")


WAITS = [
    "async def f(x): await x.remote()",
    "async def f(x): await x",
    "async def f(x): await x.answer",
    "async def f(x):\n    calls = [y.remote() for y in x]\n    await asyncio.gather(*calls)",
    "async def f(x):\n    calls = []\n    calls.append(x.remote())\n    await asyncio.gather(*calls)",
    "async def f(x): await asyncio.gather(x.a.remote(), x.b.remote(), return_exceptions=True)",
    "async def f(x): await asyncio.gather(g(), x.remote())\nasync def g(): ...",
    "async def f(x):\n    task = asyncio.create_task(x.run())\n    await task",
    "async def f(x): await asyncio.wait([x])",
    "async def f(x): await asyncio.wait([x], timeout=None)",
    "async def f(x): await asyncio.wait_for(x)",
    "async def f(x): await asyncio.to_thread(x.shutdown)",
    "async def f(loop, x): await loop.run_in_executor(None, x)",
    "async def f(engine): await engine.collective_rpc('ready')",
    "async def f(event): await event.wait()",
    "async def f(queue): await queue.get()",
    "async def f(lock): await lock.acquire()",
    "async def f(lock):\n    async with lock: ...",
    "async def f(stream):\n    async for _ in stream: ...",
    "async def f(stream): return [x async for x in stream]",
    "async def f(tasks, x): tasks.create_task(x.fill.remote())",
    "async def f(x):\n    while not x.done(): await asyncio.sleep(1)",
    "async def f(x): return await g(await x)\nasync def g(y): ...",
    "def f(x): ray.get(x)",
    "def f(x): ray.get(x, timeout=None)",
    "def f(x): ray.wait([x], num_returns=1)",
    "def f(queue): queue.get()",
    "def f(queue): queue.get(block=True)",
    "def f(thread): thread.join()",
    "def f(future): future.result()",
    "def f(future): future.result(timeout=None)",
    "def f(future): future.exception()",
    "def f(future): concurrent.futures.wait([future])\nfrom concurrent import futures\ndef g(x): futures.wait([x])",
    "from concurrent.futures import wait\ndef f(x): wait([x])",
    "def f(x):\n    for y in as_completed(x): ...",
    "def f(event): event.wait()",
    "def f(condition): condition.wait_for(lambda: True)",
    "def f(lock): lock.acquire()",
    "def f(lock): lock.acquire(blocking=True)",
    "def f(lock):\n    with lock: ...",
    "def f(self):\n    with self._lock: ...",
    "def f():\n    with ThreadPoolExecutor(1) as pool: pool.submit(print)",
    "def f(pool): pool.shutdown()",
    "def f(process): process.wait()",
    "def f(process): process.communicate()",
    "def f(process): process.communicate(b'x')",
    "def f(): subprocess.run(['true'])",
    "def f(): subprocess.check_output(['true'])",
    "def f(file): fcntl.flock(file, fcntl.LOCK_EX)",
    "def f(pid): os.waitpid(pid, 0)",
    "def f(poller): poller.poll()",
    "def f(url): urlopen(url)",
    "def f(x): socket.create_connection(x)",
    "def f(x):\n    while not x.done():\n        time.sleep(0.1)",
    # A limit that is none.
    "def f(queue): queue.get(True)",
    "def f(queue): queue.get(True, None)",
    "def f(queue): queue.get(True, timeout=None)",
    "def f(future): future.result(None)",
    "def f(future): future.exception(None)",
    "def f(future, limit): future.result(None if limit is None else limit.seconds)",
    "def f(thread): thread.join(None)",
    "def f(event): event.wait(None)",
    "async def f(event): await event.wait(None)",
    "def f(condition): condition.wait_for(lambda: True, None)",
    "def f(lock): lock.acquire(True)",
    "def f(lock): lock.acquire(True, -1)",
    "def f(lock): lock.acquire(timeout=-1)",
    "def f(poller): poller.poll(None)",
    "def f(poller): poller.poll(-1)",
    "def f(process): process.communicate(b'x', None)",
    "def f(x): select.select(x, [], [], None)",
    "def f(x): futures.wait([x], None)",
    # Groups of processes, and what all of a group must do.
    "def f(): torch.distributed.init_process_group('nccl')",
    "def f(): torch.distributed.init_process_group('nccl', timeout=None)",
    "def f(): torch.distributed.new_group([0, 1])",
    "def f(): dist.new_group([0, 1], None)",
    "def f(): deepspeed.init_distributed('gloo', verbose=False)",
    "def f(): TCPStore('h', 1, 2, True)",
    "def f(store): ProcessGroupGloo(store, 0, 2)",
    "def f(nccl, unique): nccl.NcclCommunicator(2, unique, 0)",
    "def f(): ray.util.collective.init_collective_group(2, 0, 'nccl')",
    "def f(x): torch.distributed.all_reduce(x)",
    "def f(x): torch.distributed.all_gather([x], x)",
    "def f(): torch.distributed.barrier()",
    "def f(): dist.monitored_barrier()",
    "from torch.distributed import all_reduce\ndef f(x): all_reduce(x)",
    "from torch.distributed import send\ndef f(x): send(x, 1)",
    "import torch.distributed as td\ndef f(x): td.gather(x)",
    "from torch import distributed\ndef f(x): distributed.reduce(x, 0)",
    "def f(x): dist.scatter(x)",
    "def f(group, x): group.broadcast([x], options)",
    "def f(group, x): group.allreduce([x]).wait()",
    "def f(communicator, x, stream): communicator.allReduce(x, x, 1, 0, 0, stream)",
]
BOUNDED = [
    "async def f(x): await within(1.0, x.remote(), 'x')",
    "async def f(x): await within(1.0, asyncio.gather(*(y.remote() for y in x)), 'x')",
    "async def f(x):\n    waits = (within(1.0, y, 'y') for y in x)\n    await asyncio.gather(*waits)",
    "async def f(x): await keep(1.0, x.remote())\nasync def keep(s, x):\n    return await within(s, x, 'x')",
    "async def f(): await g()\nasync def g(): await asyncio.sleep(1)",
    "async def f(event):\n    async with asyncio.timeout(1.0):\n        await event.wait()",
    "async def f(x):\n    deadline = asyncio.timeout(1.0)\n    async with deadline: return await x",
    "async def f(x): await asyncio.wait([x], timeout=1.0)",
    "async def f():\n    async with asyncio.TaskGroup() as tasks: tasks.create_task(g())\nasync def g(): ...",
    "def f(x): ray.get(x, timeout=1.0)",
    "def f(future): future.result(1.0)",
    "def f(thread): thread.join(1.0)",
    "def f(lock): lock.acquire(blocking=False)",
    "def f(words, mapping): ', '.join(words); mapping.get('a'); os.path.join('a', 'b')",
    "def f(process): process.wait(10.0)",
    "def f(): subprocess.run(['true'], timeout=1.0)",
    "def f(file): fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
    "def f(x, deadline):\n    while not x.done() and time.monotonic() < deadline: time.sleep(0.1)",
    "def f(path):\n    with open(path) as file: return file.read()",
    "def f(queue): queue.get(True, 1.0)",
    "def f(queue): queue.get(False)",
    "def f(lock): lock.acquire(False)",
    "def f(lock): lock.acquire(True, 1.0)",
    "def f(poller): poller.poll(100)",
    "def f(mapping, key): mapping.get(key, None)",
    "def f(limit): torch.distributed.init_process_group('nccl', timeout=limit)",
    "def f(limit): torch.distributed.new_group([0, 1], limit)",
    "def f(limit): TCPStore('h', 1, 2, True, limit)",
    "def f(limit): dist.monitored_barrier(timeout=limit)",
    "def f(x): return dist.all_reduce(x, async_op=True)",
    "def f(x, index): return x.gather(0, index), x.scatter(0, index, x), functools.reduce(max, x)",
    "def f(x): x.send('a')",
]


@pytest.mark.parametrize("source", WAITS)
def test_a_wait_without_a_deadline_is_found(source: str) -> None:
    assert waits_without_deadline(source, set())


@pytest.mark.parametrize("source", BOUNDED)
def test_what_has_a_deadline_is_left_alone(source: str) -> None:
    assert not waits_without_deadline(source, set())


def test_each_wait_of_a_file_is_named_by_function_and_text() -> None:
    source = "class A:\n    async def f(self, x):\n        await x.remote()\n        x.event.wait()\n"
    waits = waits_without_deadline(source, set())
    assert [(wait.function, wait.text, wait.line) for wait in waits] == [
        ("A.f", "await x.remote()", 3),
        ("A.f", "x.event.wait()", 4),
    ]
