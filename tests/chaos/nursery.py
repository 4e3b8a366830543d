"""Ray's workers are forked from a process that has loaded torch, which saves seconds of computing for each of them.

Where Ray would run its own set-up script, it runs this file, which hands its arguments, environment and outputs over a
socket and is gone; `python -m tests.chaos.nursery SOCKET` forks a process that becomes the worker. Ray itself is
imported there, in the environment of its own run. Such a worker is nobody's child but the nursery's: who wants to know
what belongs to a run looks at `workers` beside its faults, too.
"""

import json
import os
import socket
import sys

SOCKET = "PACELINE_CHAOS_NURSERY"
"""Environment variable: where the nursery listens."""
FAULTS = "PACELINE_CHAOS"
WORKERS = "workers"
"""A file beside the faults of a run: a line for each worker, its process and when that began."""
_PRELOADED = (
    "tests.chaos.policy", "attr", "filelock", "google.protobuf.descriptor_pool", "jsonschema", "msgpack",
    "packaging.version", "psutil", "requests", "yaml",
)  # fmt: skip
_PR_SET_PDEATHSIG = 1
_CONTEXT = "--serialized-runtime-env-context="


def hand_over() -> None:
    """Ray has started this file as a worker's set-up."""
    given = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as nursery:
        nursery.settimeout(30.0)
        nursery.connect(os.environ[SOCKET])
        sent = socket.send_fds(nursery, [given], [0, 1, 2])
        nursery.sendall(given[sent:])
        nursery.shutdown(socket.SHUT_WR)
        nursery.recv(1)


def serve(path: str) -> None:
    """Fork one process for each connection; returns in those processes alone, when they are what was asked for."""
    import importlib
    import signal

    _die_with_parent()
    for name in _PRELOADED:
        importlib.import_module(name)
    assert "ray" not in sys.modules, "it looks at the environment when it is imported"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(64)
    while True:
        connection, _ = listener.accept()
        with connection:
            given, descriptors = _received(connection)
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _become(given, descriptors)
                connection.sendall(b"1")
                return
            for descriptor in descriptors:
                os.close(descriptor)


def _received(connection: socket.socket) -> tuple[bytes, list[int]]:
    connection.settimeout(30.0)
    given, descriptors, _, _ = socket.recv_fds(connection, 2**20, 3)
    while more := connection.recv(2**20):
        given += more
    return given, descriptors


def _become(given: bytes, descriptors: list[int]) -> None:
    """The process that Ray has asked for, but for its parent."""
    arguments, env, folder = json.loads(given)
    _die_with_parent()
    os.setsid()
    os.chdir(folder)
    for standard, descriptor in enumerate(descriptors):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    context = next((one.removeprefix(_CONTEXT) for one in arguments if one.startswith(_CONTEXT)), "{}")
    for name, value in json.loads(context).get("env_vars", {}).items():
        env[name] = os.path.expandvars(value)
    os.environ.clear()
    os.environ |= env
    sys.argv = [one for one in arguments if not one.startswith((_CONTEXT, "--language="))]
    if FAULTS in env:
        import psutil

        with open(os.path.join(env[FAULTS], WORKERS), "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {psutil.Process().create_time()}\n")


def _die_with_parent() -> None:
    import ctypes
    import signal

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
        import runpy

        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        hand_over()
