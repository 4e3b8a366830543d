"""A Ray that we start is reached from this machine alone, and only by who holds the token of this session.

Ray runs whatever it is sent by anybody who reaches its ports, so both are on by default. They are said to Ray in the
environment, where its processes look, and before Ray is imported, when it reads them; the token is in no file and in
no command line.
"""

import contextlib
import ipaddress
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import psutil

from actors.errors import RunError, last_line
from deploy.jobs.shipment import EXCLUDES
from deploy.stopping import disarmed

# Ray binds to loopback alone where it does not mean to form clusters, which this says on Linux as well.
_NO_CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_END_S = 5.0
TOKEN_FIX = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE as on its nodes (SECURITY.md)"


def shut_in(env: MutableMapping[str, str]) -> None:
    """A Ray that is started with this environment is ours alone; what the user has set stays."""
    env.setdefault(_NO_CLUSTER, "0")
    env.setdefault("RAY_AUTH_MODE", "token")
    if env["RAY_AUTH_MODE"] == "token" and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(env):
        env["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def show_token(env: MutableMapping[str, str]) -> None:
    """A token that is in the environment is shown to the cluster, as Ray's own programs do; before Ray is loaded."""
    if env.get("RAY_AUTH_TOKEN") or env.get("RAY_AUTH_TOKEN_PATH"):
        env.setdefault("RAY_AUTH_MODE", "token")


class ClusterError(ValueError):
    """The cluster cannot be joined, or a run cannot be on it, as it is: for the user to mend, and nothing has begun."""


@contextlib.contextmanager
def ray_session(address: str | None, say: Callable[[str], None]) -> Iterator[None]:
    """Join the cluster at `address`, else start a local Ray; a Ray started here ends here.

    ClusterError when it does not let us in; RunError when none starts here.
    """
    import ray

    try:
        with disarmed():
            _join(address)
            if address is not None and is_open(ray.get_runtime_context().gcs_address, os.environ):
                say(
                    f"warning: the Ray cluster at {ray.get_runtime_context().gcs_address} asks for no token: whoever "
                    "reaches its ports can run code there (SECURITY.md says how to set one)"
                )
            yield
    finally:
        ray.shutdown()


def _join(address: str | None) -> None:
    import ray

    if address is not None:
        with refusals(address):
            _init(address)
        return
    ours = psutil.Process().children()
    with contextlib.ExitStack() as undo:
        undo.callback(_end_children_but, ours)
        try:
            with disarmed():
                _init(None)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            why = last_line(error)
            raise RunError(f"the local Ray did not start: {why}; see /tmp/ray/session_latest/logs") from None
        undo.pop_all()


def _end_children_but(ours: Collection[psutil.Process]) -> None:
    """Ray itself does not know yet what it has started when it is interrupted. The raylet first: it ends its agents,
    which would outlive it for a minute if it died before it could; so they are looked up while it stands still."""
    children = [child for child in psutil.Process().children() if child not in ours]
    raylets = [child for child in children if _name(child) == "raylet"]
    agents = [agent for raylet in raylets for agent in _children_of(raylet)]
    for some in (raylets, [*children, *agents]):
        for child in some:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.terminate()
                child.resume()
        psutil.wait_procs(some, timeout=_END_S)
    for child in (*children, *agents):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _children_of(process: psutil.Process) -> list[psutil.Process]:
    """All there are; it stands still from now on."""
    try:
        process.suspend()
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def _init(address: str | None) -> None:
    import logging

    import ray

    here = str(Path.cwd())
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        # Replicas and reward workers start processes of their own, which must find these packages too.
        runtime_env = {"env_vars": {"PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}}
        ray.init("local", include_dashboard=False, _node_ip_address="127.0.0.1", runtime_env=runtime_env, **quiet)
    elif "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        ray.init(address, **quiet)  # a submitted job has brought its working directory already
    else:
        ray.init(address, runtime_env=sent_along(here), **quiet)


def sent_along(folder: str) -> dict[str, Any]:
    """What Ray packs and sends to a cluster that is joined: the folder, without what `submit` leaves here, too."""
    return {"working_dir": folder, "excludes": [*EXCLUDES]}


@contextlib.contextmanager
def refusals(address: str) -> Iterator[None]:
    """What Ray raises when it joins a cluster, or would wait for, as a ClusterError with the fix."""
    from ray.exceptions import RayError

    from actors.run.machine import answers
    from deploy.knock import head_of, turned_away

    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"--address {address}: this is where a cluster takes jobs (python -m deploy submit); to join it, give the "
            "port of its head, such as HEAD:6379"
        )
    host = address.removeprefix("ray://")
    if host.rpartition(":")[2].isdecimal() and not answers(host):
        raise ClusterError(
            f"--address {address}: nobody answers there; start Ray there (ray start --head), or correct --address"
        )
    head = head_of(address)
    if head is not None and turned_away(head):
        raise ClusterError(f"--address {address}: {_shut_out(os.environ)}")
    try:
        yield
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        tried = re.search(r"Failed to connect to Ray cluster at (\S+)", str(error))
        is_there = tried is not None and answers(tried[1])
        raise ClusterError(f"--address {address}: {why_refused(error, is_there, os.environ)}") from None


def why_refused(error: BaseException, is_there: bool, env: Mapping[str, str]) -> str:
    """Why Ray did not join a cluster, and what to do, from what it raised; `is_there`: somebody listens where it tried.

    Of a token that is missing or wrong Ray says no more than that it failed to connect.
    """
    text = " ".join(str(error).split())
    if "Version mismatch" in text:
        return f"{text}; run the head's versions of Ray and Python here, or ours there"
    if "token" in text.lower() or "authentication" in type(error).__name__.lower():
        return f"{text.split('. Ensure')[0].rstrip('.')}; {TOKEN_FIX}"
    if is_there:
        return _shut_out(env)
    return f"{last_line(error)}; start Ray there (ray start --head), or correct --address"


def _shut_out(env: Mapping[str, str]) -> str:
    shows = env.get("RAY_AUTH_MODE", "").lower() == "token"
    asks = "has another token than the one that is set here" if shows else "asks for a token, and none is set here"
    return f"somebody answers there and does not let us in, as a head does that {asks}; {TOKEN_FIX}"


def is_open(gcs_address: str, env: MutableMapping[str, str]) -> bool:
    """Whether a cluster that let us in with this environment lets everybody in, from other machines too."""
    host = gcs_address.rpartition(":")[0].strip("[]")
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return False
    # A cluster that asks for a token refuses who has none. (Ray sets the mode itself when it finds a token.)
    return env.get("RAY_AUTH_MODE", "").lower() != "token"
