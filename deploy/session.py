"""A Ray that we start is reached from this machine alone, and only by who holds the token of this session.

Ray runs whatever it is sent by anybody who reaches its ports, so both are on by default. They are said to Ray in the
environment, where its processes look, and before Ray is imported, when it reads them; the token is in no file and in
no command line.
"""

import contextlib
import ipaddress
import os
import secrets
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from actors.errors import RunError, last_line

# Ray binds to loopback alone where it does not mean to form clusters, which this says on Linux as well.
_NO_CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def shut_in(env: MutableMapping[str, str]) -> None:
    """A Ray that is started with this environment is ours alone; what the user has set stays."""
    env.setdefault(_NO_CLUSTER, "0")
    env.setdefault("RAY_AUTH_MODE", "token")
    if env["RAY_AUTH_MODE"] == "token" and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(env):
        env["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextlib.contextmanager
def ray_session(address: str | None, say: Callable[[str], None]) -> Iterator[None]:
    """Join the cluster at `address`, else start a local Ray; a Ray started here ends here."""
    import ray

    try:
        _init(address)
    except (ConnectionError, RuntimeError, ValueError) as error:  # nobody there, or it does not let us in
        where = "the local Ray did not start" if address is None else f"--address {address}"
        raise RunError(f"{where}: {last_line(error)}") from None
    try:
        if address is not None and is_open(ray.get_runtime_context().gcs_address, os.environ):
            say(
                f"warning: the Ray cluster at {ray.get_runtime_context().gcs_address} asks for no token: whoever "
                "reaches its ports can run code there (SECURITY.md says how to set one)"
            )
        yield
    finally:
        ray.shutdown()


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
        ray.init(address, runtime_env={"working_dir": here}, **quiet)


def is_open(gcs_address: str, env: MutableMapping[str, str]) -> bool:
    """Whether a cluster that let us in with this environment lets everybody in, from other machines too."""
    host = gcs_address.rpartition(":")[0].strip("[]")
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return False
    # A cluster that asks for a token refuses who has none. (Ray sets the mode itself when it finds a token.)
    return env.get("RAY_AUTH_MODE", "").lower() != "token"
