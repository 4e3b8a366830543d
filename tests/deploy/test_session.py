"""A Ray that we start listens on this machine alone and refuses whoever has no token; an open cluster is told."""

import json
import os
import subprocess
import sys

import pytest

from deploy.session import ClusterError, is_open, refusals, shut_in, why_refused


def test_a_local_ray_gets_a_token_of_its_own_each_time() -> None:
    first: dict[str, str] = {}
    second: dict[str, str] = {}
    shut_in(first)
    shut_in(second)
    assert first["RAY_AUTH_MODE"] == "token"
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]


@pytest.mark.parametrize(
    "env", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "mine"}, {"RAY_AUTH_TOKEN_PATH": "/a/file"}]
)
def test_what_the_user_has_set_stays(env: dict[str, str]) -> None:
    after = dict(env)
    shut_in(after)
    assert {**after, **env} == after
    assert set(after) & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} == set(env) - {"RAY_AUTH_MODE"}


@pytest.mark.parametrize(
    ("address", "env", "told"),
    [
        ("10.0.0.2:6379", {}, True),
        ("10.0.0.2:6379", {"RAY_AUTH_MODE": "disabled"}, True),
        ("[fd00::2]:6379", {}, True),
        ("head.cluster:6379", {}, True),
        ("10.0.0.2:6379", {"RAY_AUTH_MODE": "token"}, False),
        ("127.0.0.1:6379", {}, False),
        ("[::1]:6379", {}, False),
    ],
)
def test_a_cluster_is_open_when_it_asks_for_no_token_and_is_reached_from_elsewhere(
    address: str, env: dict[str, str], told: bool
) -> None:
    assert is_open(address, env) is told


MISMATCH = RuntimeError(
    "Version mismatch: The cluster was started with:\n    Ray: 2.59.0\n    Python: 3.12.1\n"
    "This process on Ray Node was started with:\n    Ray: 2.60.0\n    Python: 3.11.7\n"
)


@pytest.mark.parametrize(
    ("error", "is_there", "env", "said"),
    [
        (MISMATCH, True, {}, "Ray: 2.59.0 Python: 3.12.1 This process on Ray Node was started with: Ray: 2.60.0"),
        (RuntimeError("Invalid or missing token. Ensure that it is there"), False, {}, "Invalid or missing token; set"),
        (ConnectionError("Failed to connect"), True, {}, "as a head does that asks for a token, and none is set here;"),
        (ConnectionError("Failed to connect"), True, {"RAY_AUTH_MODE": "token"}, "has another token than the one that"),
        (ConnectionError("Could not find any running Ray instance."), False, {}, "Could not find any running Ray inst"),
    ],
)
def test_why_a_cluster_was_not_joined_is_told_with_the_fix(
    error: Exception, is_there: bool, env: dict[str, str], said: str
) -> None:
    assert said in why_refused(error, is_there, env)
    assert "; " in why_refused(error, is_there, env)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:9", "--address 127.0.0.1:9: nobody answers there; start Ray there"),
        ("ray://127.0.0.1:9", "nobody answers there"),
        ("http://127.0.0.1:8265", "this is where a cluster takes jobs .python -m deploy submit.; to join it, give the"),
    ],
)
def test_an_address_that_cannot_be_joined_is_told_before_ray_tries(address: str, said: str) -> None:
    with pytest.raises(ClusterError, match=said), refusals(address):
        pytest.fail("Ray would try")


SESSION = """
import json, os, psutil, socket, subprocess, sys, time
from pathlib import Path
from deploy.session import ray_session, shut_in
shut_in(os.environ)
token = os.environ["RAY_AUTH_TOKEN"]
started = time.monotonic()

def look(session):
    ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = [(process.name(), found.laddr.ip)
                 for process in ours for found in process.net_connections("inet") if found.status == "LISTEN"]
    told = [process.name() for process in ours if any(token in word for word in process.cmdline())]
    written = subprocess.run(["grep", "-rlaF", token, session], capture_output=True, text=True).stdout.split()
    return {"listening": listening, "told": told, "written": written}

def let_in(gcs, mode):
    knock = f"import ray; ray.init('{gcs}', logging_level='CRITICAL'); print('LET IN')"
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run([sys.executable, "-c", knock], env=env | mode, capture_output=True, text=True)
    return "LET IN" in done.stdout

with ray_session(None, print):
    import ray
    from sync.transport import open_wire
    from actors.policy import node_ip

    @ray.remote
    class Wire:
        def open(self):
            self.opened = open_wire("gloo", node_ip(), 10.0)
            return self.opened.ticket.address

    wire = Wire.remote()
    address = ray.get(wire.open.remote(), timeout=60)
    seconds = time.monotonic() - started
    session = ray._private.worker._global_node.get_session_dir_path()
    gcs = ray.get_runtime_context().gcs_address
    seen = look(session)
    modes = {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}
    strangers = [mode for mode in modes if let_in(gcs, mode)]
    friend = let_in(gcs, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token})
    # The same once more, when there is something to see.
    door = socket.create_server(("0.0.0.0", 0))
    Path(session, "careless.txt").write_text(f"the token is {token}")
    careless = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", token])
    control = look(session)
    careless.kill()
    door.close()
print(json.dumps({"seen": seen, "strangers": strangers, "wire": address, "s": seconds, "friend": friend,
                  "control": control}))
"""


def outside(listening: list[list[str]]) -> set[str]:
    """Processes that listen on other addresses than this machine's own."""
    return {name for name, ip in listening if not ip.startswith(("127.", "::1", "::ffff:127."))}


@pytest.mark.cluster
def test_a_local_ray_listens_on_this_machine_alone_and_lets_no_stranger_in() -> None:
    """And a port, a file, an argument and a guest that should not be there would be seen."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", SESSION], env=env, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    seen, control = found["seen"], found["control"]
    assert seen["told"] == [], "no argument of any process holds the token"
    assert seen["written"] == [], "Ray's session folder does not hold the token"
    assert found["strangers"] == [], "no stranger was let in"
    assert found["wire"].startswith("127.")
    assert seen["listening"]
    assert outside(seen["listening"]) == set(), "these listen on other addresses than this machine's own"
    assert len(control["told"]) == 1
    assert [path.rpartition("/")[2] for path in control["written"]] == ["careless.txt"]
    assert len(outside(control["listening"])) == 1
    assert found["friend"], "who has the token is let in"
