"""Whatever a reward function does, its scores are None, the cause is counted, and the next call works."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from actors.recipe.rewards import RewardConfig
from actors.reward import RewardActor, score_names, steps_of, total_rewards, unscorable
from actors.rewards.docket import Outcome
from actors.rewards.functions import check_reward, checked_scores, describe
from algorithms.types import Group, Messages, Prompt, Rollout, ScoredGroup

FILE = "tests/actors/misbehaving_rewards.py"
TIMEOUT_S = 1.0


def group(text: str | Messages = "question", **columns: object) -> Group:
    """A group of two rollouts, two sampled tokens each."""
    rollout = Rollout(
        token_ids_T=np.array([1, 2, 3], np.int32),
        loss_mask_T=np.array([False, True, True]),
        logprobs_T=np.zeros(3, np.float32),
        spans=(),
        finish_reason="stop",
    )
    return Group(Prompt(0, 0, (1,), text, columns), (rollout, rollout), attempt=0, replica=0)


def actor_of(*names: str, weights: tuple[float, ...] = (), timeout_s: float = TIMEOUT_S) -> RewardActor:
    padded = weights or (1.0,) * len(names)
    return RewardActor(
        tuple(RewardConfig(function=f"{FILE}:{name}", weight=w) for name, w in zip(names, padded, strict=True)),
        timeout_s,
    )


def score(actor: RewardActor, **columns: object) -> ScoredGroup:
    return asyncio.run(actor.score(group(**columns), ["a", "b"]))


@pytest.fixture(scope="module")
def actor() -> Iterator[RewardActor]:
    actor = actor_of("misbehave")
    yield actor
    actor.close()


@pytest.fixture(scope="module")
def async_actor() -> Iterator[RewardActor]:
    actor = actor_of("misbehave_async", "half")
    yield actor
    actor.close()


FAILURES = {
    "exception": (
        "raises",
        "raises SystemExit",
        "raises KeyboardInterrupt",
        "raises BaseException",
        "raises GeneratorExit",
        "raises huge",
        "raises unprintable",
        "raises an asyncio.CancelledError",
        "recurses for ever",
        "raises from SIGALRM",
    ),
    "memory": ("runs out of memory",),
    "died": (
        "os._exit",
        "segfaults",
        "aborts",
        "kills itself",
        "kills its group",
        "is killed by SIGALRM",
        "closes descriptors",
        "writes to descriptors",
        "forks and exits",
    ),
    "timeout": (
        "loops in Python",
        "loops in C",
        "sleeps",
        "waits for a lock",
        "ignores all signals",
        "stops itself",
        "forks and hangs",
    ),
    "bad_output": (
        "None",
        "a float",
        "a str",
        "a dict",
        "a generator",
        "a coroutine function",
        "too few",
        "too many",
        "empty",
        "nested",
        "strings",
        "bools",
        "numpy bools",
        "NaN",
        "infinity",
        "minus infinity",
        "huge integers",
        "complex",
        "fractions",
        "a list that lies",
        "matrix",
    ),
}


@pytest.mark.parametrize(("how", "cause"), [(how, cause) for cause, hows in FAILURES.items() for how in hows])
def test_failure_is_none_and_counted_and_the_next_call_works(actor: RewardActor, how: str, cause: str) -> None:
    started = time.monotonic()
    scored = score(actor, how=how)
    assert time.monotonic() - started < TIMEOUT_S + 10
    assert scored.rewards_G == (None, None)
    assert scored.scores == {"misbehave": (None, None)}
    assert scored.failures == {cause: 1}
    assert score(actor, how="good").rewards_G == (1.0, 1.0)


SCORES = {
    "integers": (1.0, 1.0),
    "tuple": (1.0, 1.0),
    "numpy array": (1.0, 1.0),
    "numpy scalars": (1.0, 1.0),
    "all None": (None, None),
    "some None": (None, 2.0),
    "1e308": (1e308, 1e308),
    "floods stdout": (1.0, 1.0),
    "spawns threads": (1.0, 1.0),
    "forks and returns twice": (1.0, 1.0),
    "forks and leaves a child": (1.0, 1.0),
    "starts a program": (1.0, 1.0),
    "starts a process": (1.0, 1.0),
    "mutates its inputs": (1.0, 1.0),
    "leaves a timer": (1.0, 1.0),
    "changes everything": (1.0, 1.0),
    "closes the event loop": (1.0, 1.0),
    "runs an event loop": (1.0, 1.0),
    "returns an awaitable": (1.0, 1.0),
}


@pytest.mark.parametrize(("how", "expected"), SCORES.items())
def test_odd_but_sound_calls_give_their_scores(
    actor: RewardActor, how: str, expected: tuple[float | None, ...]
) -> None:
    scored = score(actor, how=how)
    assert scored.rewards_G == expected
    assert scored.failures == {}
    assert score(actor, how="good").rewards_G == (1.0, 1.0)


def test_a_timer_that_a_call_left_does_not_kill_the_next(actor: RewardActor) -> None:
    assert score(actor, how="leaves a timer").failures == {}
    time.sleep(1.1)
    assert score(actor, how="good").failures == {}


def test_a_broken_child_is_replaced(actor: RewardActor) -> None:
    score(actor, how="replaces json.loads")
    score(actor, how="good")
    assert score(actor, how="good").rewards_G == (1.0, 1.0)


def test_a_bad_item_costs_its_own_score_alone(actor: RewardActor) -> None:
    scored = score(actor, how="one NaN")
    assert scored.rewards_G == (None, 2.0)
    assert scored.failures == {"bad_output": 1}


@pytest.mark.parametrize(
    ("how", "failures", "half"),
    [
        ("good", {}, 0.5),
        ("raises", {"exception": 1}, 0.5),
        ("raises SystemExit", {"exception": 1}, 0.5),
        ("is cancelled", {"exception": 1}, 0.5),
        ("bad output", {"bad_output": 1}, 0.5),
        # What stops the event loop or the process stops all that were gathered.
        ("leaves a task that exits", {"exception": 2}, None),
        ("stops the loop", {"exception": 2}, None),
        ("never awaits", {"timeout": 2}, None),
        ("sleeps", {"timeout": 1}, 0.5),  # cut off in the loop, so what the other gave is kept
    ],
)
def test_async_functions_are_gathered(
    async_actor: RewardActor, how: str, failures: dict[str, int], half: float | None
) -> None:
    scored = score(async_actor, how_async=how)
    own = 1.0 if how == "good" else None
    assert scored.scores == {"misbehave_async": (own, own), "half": (half, half)}
    assert scored.failures == failures
    assert score(async_actor, how_async="good").rewards_G == (1.5, 1.5)


def test_a_bad_item_beside_another_function_is_no_zero() -> None:
    """The sum of the others alone would put the rollout below those that the function did score."""
    actor = actor_of("half", "misbehave")
    try:
        scored = score(actor, how="one NaN")
        assert scored.scores == {"half": (0.5, 0.5), "misbehave": (None, 2.0)}
        assert scored.rewards_G == (None, 2.5)
        assert scored.failures == {"bad_output": 1}
        assert score(actor, how="some None").rewards_G == (0.5, 2.5), "what is given on purpose is TRL's None"
    finally:
        actor.close()


def test_who_is_failed_has_no_reward() -> None:
    half, given = Outcome((0.5, 0.5, 0.5)), Outcome((None, 1.0, 2.0))
    bad, all_bad = Outcome((None, 1.0, None), "bad_output", "x"), Outcome((None, None, None), "timeout", "x")
    assert unscorable([half, given], (1.0, 1.0)) == frozenset(), "None on purpose is TRL's"
    assert unscorable([half, bad], (1.0, 1.0)) == {0, 2}
    assert unscorable([half, all_bad], (1.0, -0.5)) == {0, 1, 2}
    assert unscorable([half, all_bad], (1.0, 0.0)) == frozenset(), "what is only measured costs nobody"
    assert total_rewards([half.scores, bad.scores], (1.0, 1.0), {0, 2}) == ((None, 1.5, None), 0)


@pytest.mark.parametrize(("weight", "rewards"), [(1.0, (None, None)), (0.0, (1.0, 1.0))])
def test_one_function_that_fails_does_not_cost_the_scores_of_others(weight: float, rewards: tuple) -> None:
    actor = actor_of("half", "misbehave", "nothing", weights=(2.0, weight, 1.0))
    try:
        for how, cause in (("sleeps", "timeout"), ("segfaults", "died"), ("raises", "exception")):
            scored = score(actor, how=how)
            assert scored.scores == {"half": (0.5, 0.5), "misbehave": (None, None), "nothing": (None, None)}
            assert scored.rewards_G == rewards
            assert scored.failures == {cause: 1}
    finally:
        actor.close()


def test_a_call_is_exactly_trls() -> None:
    actor = actor_of("echo")
    try:
        columns = {"answer": "x", "entry": {"k": [1, None, 2.5]}}
        scored = score(actor, text=[{"role": "user", "content": "hi"}], **columns)
        assert scored.rewards_G == (1.0, 1.0)
        assert scored.completions == ("a", "b")
    finally:
        actor.close()


def test_the_weighted_sum_that_overflows_is_none_and_counted() -> None:
    actor = actor_of("misbehave", weights=(100.0,))
    try:
        scored = score(actor, how="1e308")
        assert (scored.rewards_G, scored.failures) == ((None, None), {"bad_output": 1})
    finally:
        actor.close()


def test_a_megabyte_of_text_goes_through() -> None:
    actor = actor_of("misbehave", timeout_s=10.0)
    try:
        scored = asyncio.run(actor.score(group(how="good", big="\ud800x" * 500_000), ["y" * 1_000_000] * 2))
        assert scored.rewards_G == (1.0, 1.0)
    finally:
        actor.close()


def test_calls_queue_up_and_keep_their_order(actor: RewardActor) -> None:
    async def many() -> list[ScoredGroup]:
        hows = ["good", "raises", "sleeps", "good", "os._exit", "good"]
        return await asyncio.gather(*(actor.score(group(how=how), ["a", "b"]) for how in hows))

    causes = [tuple(scored.failures) for scored in asyncio.run(many())]
    assert causes == [(), ("exception",), ("timeout",), (), ("died",), ()]


def test_close_ends_a_call_in_progress_and_leaves_no_process() -> None:
    actor = actor_of("where", "misbehave", timeout_s=60.0)
    pid = int(score(actor, how="forks and leaves a child").scores["where"][0] or 0)
    members = [process.pid for process in psutil.process_iter() if _group_of(process.pid) == pid]
    assert len(members) == 2

    async def close_soon() -> None:
        call = asyncio.create_task(actor.score(group(how="sleeps"), ["a", "b"]))
        await asyncio.sleep(0.3)
        started = time.monotonic()
        await asyncio.to_thread(actor.close)
        assert time.monotonic() - started < 5
        with pytest.raises(RuntimeError, match="closed"):
            await call

    asyncio.run(close_soon())
    assert not any(_alive(member) for member in members)


def test_the_child_dies_with_its_parent() -> None:
    code = """
import sys
sys.path.insert(0, ".")
from tests.actors.test_reward import actor_of, group, score
actor = actor_of("where", "misbehave", timeout_s=60.0)
print(int(score(actor, how="good").scores["where"][0]), flush=True)
score(actor, how={})
"""
    for how in ("loops in C", "ignores all signals"):
        parent = subprocess.Popen([sys.executable, "-c", code.format(repr(how))], stdout=subprocess.PIPE, text=True)
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        time.sleep(0.3)
        assert _alive(child)
        parent.send_signal(signal.SIGKILL)
        parent.wait(10)
        assert _gone_within(child, 5.0), how


def test_check_loads_the_functions() -> None:
    actor = actor_of("misbehave")
    asyncio.run(actor.check())
    actor.close()
    actor = actor_of("no_such_function")
    with pytest.raises(ValueError, match="defines no 'no_such_function'"):
        asyncio.run(actor.check())
    actor.close()


def test_a_file_that_breaks_during_the_run_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "reward.py"
    file.write_text("import os\ndef f(completions, how, **kwargs):\n    os._exit(1) if how[0] == 'die' else None\n"
                    "    return [1.0] * len(completions)\n")  # fmt: skip
    actor = RewardActor((RewardConfig(function=f"{file}:f"),), TIMEOUT_S)
    try:
        assert score(actor, how="good").rewards_G == (1.0, 1.0)
        file.write_text("def f(:\n")
        assert score(actor, how="die").failures == {"died": 1}
        assert score(actor, how="good").failures == {"exception": 1}
    finally:
        actor.close()


BAD_FUNCTIONS = {
    # What the file holds, the name that is asked for, and what the message says.
    "missing name": ("def score(completions, **kwargs): ...", "skore", "did you mean 'score'.*it defines score"),
    "nothing defined": ("x = 1", "score", "it defines no functions"),
    "not callable": ("score = 3", "score", "'score' is a int, which cannot be called"),
    "import raises": ("import os\n\n1 / 0", "score", "reward.py, line 3: ZeroDivisionError: division by zero"),
    "syntax": ("def score(:", "score", "reward.py, line 1: SyntaxError"),
    "missing package": ("import no_such_package", "score", "line 1: ModuleNotFoundError: No module named 'no_such_p"),
    "exits": ("import sys\nsys.exit(3)", "score", "line 2: SystemExit: 3"),
    "dies": ("import os\nos._exit(3)", "score", r"ended during the call \(exit status 3\)"),
    "hangs": ("import time\ntime.sleep(60)", "score", "loading took more than 3 s"),
    "prints": ("print('x' * 10**6)\nscore = None", "score", "cannot be called"),
    "no completions": (
        "def score(prompts): ...",
        "score",
        r"cannot take the keywords answer, completion_ids, completions, entry; add",
    ),
    "no kwargs": ("def score(completions): ...", "score", r"add \*\*kwargs to its parameters"),
    "positional": ("def score(completions, /, **kwargs): ...", "score", "'completions' is positional-only"),
    "TRL's own": ("def score(completions, log_metric, **kwargs): ...", "score", "'log_metric' is one that TRL passes"),
    "no column": ("def score(completions, gold, **kwargs): ...", "score", "'gold' is no column.*answer, entry"),
    "other columns": ("def score(prompts, completions, completion_ids, answer): ...", "score", "keywords entry; add"),
}


@pytest.mark.parametrize(("text", "name", "message"), BAD_FUNCTIONS.values(), ids=BAD_FUNCTIONS)
def test_check_reward_says_what_is_wrong(tmp_path: Path, text: str, name: str, message: str) -> None:
    (tmp_path / "reward.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        check_reward(f"{tmp_path}/reward.py:{name}", columns=("answer", "entry"), timeout_s=3.0)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("recipes/rewards/exact_mach.py:exact_match", "there is no file .*did you mean 'exact_match.py'"),
        ("no_such_folder/reward.py:score", "there is no file"),
        ("no_such.module:score", "there is no module 'no_such'"),
        ("recipes.no_such:score", "there is no module 'recipes.no_such'"),
        ("score", "must read 'path/to/file.py:name'"),
        ("recipes/rewards/exact_match.py", "must read"),
        ("recipes/rewards/exact_match.py:", "must read"),
        (":score", "must read"),
        ("os.path:join", r"add \*\*kwargs"),
    ],
)
def test_check_reward_names_the_place(function: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_reward(function)


def test_functions_that_can_be_called_pass(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("def helper(): return 1.0")
    (tmp_path / "reward.py").write_text(
        "from functools import partial\n"
        "from neighbour import helper\n"
        "def by_kwargs(**kwargs): ...\n"
        "def some(completions, answer, **kwargs): ...\n"
        "def all_named(prompts, completions, completion_ids, answer): ...\n"
        "def optional(completions, log_metric=None, other=3, **kwargs): ...\n"
        "async def waits(completions, **kwargs): ...\n"
        "class Judge:\n    def __call__(self, completions, **kwargs): ...\n"
        "judge = Judge()\n"
        "bound = partial(some, threshold=1)\n"
    )
    for name in ("by_kwargs", "some", "all_named", "optional", "waits", "judge", "bound"):
        check_reward(f"{tmp_path}/reward.py:{name}", columns=("answer",))
    check_reward("recipes/rewards/exact_match.py:exact_match")


def test_what_an_error_says_has_bytes() -> None:
    assert describe(ValueError("no number: \ud800 \u00e9")) == "ValueError: no number: \\ud800 \u00e9"


@pytest.mark.parametrize(
    ("scores", "weights", "expected"),
    [
        ([(1.0, None)], (2.0,), ((2.0, None), 0)),
        ([(1.0, None), (None, None)], (1.0, 1.0), ((1.0, None), 0)),
        ([(1.0, 0.0), (0.5, None)], (1.0, 4.0), ((3.0, 0.0), 0)),
        ([(1e308,), (1e308,)], (1.0, 1.0), ((None,), 1)),
        ([(1.0,)], (0.0,), ((0.0,), 0)),
        ([(None, 1.0), (0.7, 0.7)], (1.0, 0.0), ((None, 1.0), 0)),
        ([(1.0,)], (-1.0,), ((-1.0,), 0)),
    ],
)
def test_total_rewards(scores: list, weights: tuple, expected: tuple) -> None:
    assert total_rewards(scores, weights) == expected


def test_sync_functions_are_called_alone_and_async_ones_together() -> None:
    assert steps_of([True, False, True, False]) == ([[1], [3]], [0, 2])
    assert steps_of([True]) == ([], [0])
    assert steps_of([False]) == ([[0]], [])


def test_scores_have_a_name_each() -> None:
    assert score_names(["a.py:f", "b.py:g"]) == ("f", "g")
    assert score_names(["a.py:f", "b.py:f", "b.py:g"]) == ("a.py:f", "b.py:f", "g")
    with pytest.raises(ValueError, match="named twice"):
        score_names(["a.py:f", "a.py:f"])


def test_torch_tensors_are_scores() -> None:
    import torch

    assert checked_scores(torch.tensor([1.0, 0.5], dtype=torch.bfloat16), 2) == ([1.0, 0.5], "")
    assert checked_scores([torch.tensor(1), torch.tensor([2.0])], 2) == ([1.0, 2.0], "")


def test_example_rewards() -> None:
    entry = {"question": "Spell this word backward: sun", "answer": "nus", "metadata": {}}
    columns = {"entry": entry, "task": "spell_backward", "settings": {"max_word_len": 5}, "answer": "nus"}
    names = ("reasoning_gym_score.py:reasoning_gym_score", "exact_match.py:exact_match")
    actor = RewardActor(tuple(RewardConfig(function=f"recipes/rewards/{name}") for name in names), 30.0)
    try:
        for text in ("question", [{"role": "user", "content": "question"}]):
            scored = asyncio.run(actor.score(group(text, **columns), [" nus", "xxs"]))
            assert scored.failures == {}
            assert scored.scores["exact_match"] == (1.0, 0.0)
            assert scored.scores["reasoning_gym_score"] == (1.0, pytest.approx(1 / 3))
    finally:
        actor.close()


@pytest.mark.cluster
def test_inside_a_ray_actor(local_ray: None) -> None:
    import ray

    handle = ray.remote(RewardActor).remote((RewardConfig(function=f"{FILE}:misbehave"),), TIMEOUT_S)
    try:
        ray.get(handle.check.remote(), timeout=60)
        hows = ["good", "sleeps", "segfaults", "good"]
        found = ray.get([handle.score.remote(group(how=how), ["a", "b"]) for how in hows], timeout=60)
        assert [scored.failures for scored in found] == [{}, {"timeout": 1}, {"died": 1}, {}]
        ray.get(handle.close.remote(), timeout=10)
    finally:
        ray.kill(handle)


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _gone_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not _alive(pid)


def test_our_folders_do_not_hide_the_modules_of_a_reward(tmp_path: Path) -> None:
    """A reward file that imports its own `data` must not get ours: only the repository itself is on the path."""
    file = tmp_path / "reward.py"
    file.write_text(
        "import sys\n"
        "def ours(completions, **kwargs):\n"
        "    return [float(any(path.endswith('/actors') for path in sys.path))] * len(completions)\n"
    )
    actor = RewardActor((RewardConfig(function=f"{file}:ours"),), 10.0)
    try:
        assert score(actor).rewards_G == (0.0, 0.0)
    finally:
        actor.close()
