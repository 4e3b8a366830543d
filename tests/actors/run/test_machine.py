"""A run does not outlive the Ray of its own machine, and goes on when another machine is lost."""

import asyncio
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from actors.errors import RunError, first_cause
from actors.recipe.upkeep import LivenessConfig
from actors.run import machine
from actors.run.machine import is_given_up, machine_watched


def node(name: str, alive: bool) -> dict[str, Any]:
    return {"NodeID": name, "Alive": alive}


def test_only_the_own_machine_counts() -> None:
    assert is_given_up("mine", [node("other", True), node("mine", False)])
    assert not is_given_up("mine", [node("other", False), node("mine", True)])
    assert not is_given_up("mine", [node("other", False)])
    assert not is_given_up("mine", [])


async def test_a_run_ends_when_its_machine_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third answer says so."""
    answers = [[node("mine", True)], [node("mine", True)], [node("mine", False)]]

    class Context:
        gcs_address = "127.0.0.1:1"

        @staticmethod
        def get_node_id() -> str:
            return "mine"

    monkeypatch.setattr(machine.ray, "get_runtime_context", Context)
    monkeypatch.setattr(machine.ray, "nodes", lambda: answers.pop(0))
    with pytest.raises(BaseExceptionGroup) as ended:
        async with machine_watched(LivenessConfig(every_s=0.01, timeout_s=1.0), print):
            await machine.asyncio.sleep(30.0)
    error = first_cause(ended.value)
    assert isinstance(error, RunError)
    assert "raylet" in str(error)
    assert answers == []


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("head_lives", [True, False])
async def test_a_run_ends_as_soon_as_its_raylet_does(sleeper: subprocess.Popen[bytes], head_lives: bool) -> None:
    """And names the head, where that has died as well."""
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as door:
        head = "{}:{}".format(*door.getsockname())
        watch = asyncio.create_task(machine._watch_raylet(sleeper.pid, head, said.append))
        await asyncio.sleep(0.2)
        assert not watch.done()
        if not head_lives:
            door.close()
        sleeper.kill()
        with pytest.raises(RunError, match=f"the raylet, process {sleeper.pid}"):
            await asyncio.wait_for(watch, 5.0)
    assert said == [f"error: {watch.exception()}"]
    assert (f"the head of the Ray cluster, {head}, is gone" in said[0]) == (not head_lives)


async def test_a_run_ends_when_the_head_is_away_for_long_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_HEAD_AWAY_S", 0.5)
    said: list[str] = []
    door = socket.create_server(("127.0.0.1", 0))
    host, port = door.getsockname()
    watch = asyncio.create_task(machine._watch_head(f"{host}:{port}", LivenessConfig(every_s=0.02), said.append))
    await asyncio.sleep(0.7)
    assert not watch.done()
    door.close()
    await asyncio.sleep(0.2)
    with socket.create_server((host, port)):  # it is there again, as after a restart
        await asyncio.sleep(0.5)
        assert not watch.done()
    with pytest.raises(RunError, match=f"the head of the Ray cluster, {host}:{port}, is gone"):
        await asyncio.wait_for(watch, 5.0)
    assert len(said) == 1
