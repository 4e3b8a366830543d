"""Environment variables of a job are given by name: a value is on no command line, and a secret never travels.

Ray keeps the environment of a job in its metadata, shows it to whoever has the cluster's token, and writes it into the
logs of its nodes. So a setting may travel; of a secret only the name does, and the cluster must have it.
"""

import re
import shlex
from collections.abc import Mapping, Sequence

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = {"KEY", "APIKEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASS", "CREDENTIAL", "CREDENTIALS", "PAT"}
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""How long Ray waits between SIGTERM and SIGKILL; it reads this in the process that starts the job."""


def is_secret(name: str) -> bool:
    """Whether a variable's name says that its value is a secret."""
    return bool(_SECRET & set(name.upper().split("_")))


def settings(names: Sequence[str], env: Mapping[str, str]) -> dict[str, str]:
    """What `--env` names, with the values that they have here."""
    for name in names:
        _check(name, "--env")
        if is_secret(name):
            raise ValueError(
                f"--env {name}: by its name this is a secret, and Ray shows and logs what a job's environment holds; "
                f"set it where the nodes run `ray start`, and name it with --secret {name}"
            )
        if name not in env:
            raise ValueError(f"--env {name}: is not set here; export {name}=... first")
    return {name: env[name] for name in names}


def secrets(names: Sequence[str]) -> tuple[str, ...]:
    """What `--secret` names: variables that the cluster must have."""
    for name in names:
        _check(name, "--secret")
    return tuple(dict.fromkeys(names))


def _check(name: str, option: str) -> None:
    known, equals, _ = name.partition("=")
    if equals:  # what stands behind it may be a secret: it is not repeated
        raise ValueError(
            f"{option} {known}: write the name alone; a value on a command line is seen by all who can list processes"
        )
    if not _NAME.fullmatch(name):
        raise ValueError(f"{option}: {name!r} is no name of a variable")
    if name.startswith("RAY_"):
        raise ValueError(f"{option} {name}: Ray's own variables are the cluster's; set it where the nodes start Ray")


def command_line(words: Sequence[str], secrets: Sequence[str]) -> str:
    """The job's command for a shell; it ends with 2 where the cluster lacks a secret."""
    asked = [
        f'[ -n "${{{name}+set}}" ] || {{ echo "error: --secret {name}: is not set on the cluster\'s head; export it '
        f'there before ray start, on every node" >&2; exit 2; }}; '
        for name in secrets
    ]
    return f"{''.join(asked)}exec {shlex.join(words)}"
