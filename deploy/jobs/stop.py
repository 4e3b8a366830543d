"""The stop verb: a run is asked to stop, and waited for until its checkpoint is there."""

import time

import typer

from actors.errors import RunError
from deploy.jobs.head import Head, HeadError, NoAnswerError
from deploy.jobs.progress import last_words
from deploy.jobs.status import known

_ASK_EVERY_S = 1.0
_MARGIN_S = 60.0
"""Beyond what Ray gives the run: for Ray to kill it, and to say so."""


def stop(head: Head, run: str) -> None:
    """Returns when the run is over; ValueError when there is none, RunError when it does not end."""
    attempt = known(run, head.attempts())[-1]
    if not attempt.under_way:
        typer.echo(f"{attempt.job} is over already: {attempt.state.lower()}, exit code {attempt.exit_code}")
        return
    wait_s = attempt.stop_wait_s + _MARGIN_S
    asked = head.stop(attempt.job)
    typer.echo(
        f"{attempt.job} stops after the step under way and leaves a checkpoint; Ray kills it if that takes longer than "
        f"{attempt.stop_wait_s:g} s"
    )
    deadline = time.monotonic() + wait_s
    while attempt.under_way:
        if time.monotonic() > deadline:
            raise RunError(f"{attempt.job} is still {attempt.state.lower()} after {wait_s:g} s; look at the cluster")
        time.sleep(_ASK_EVERY_S)
        try:
            # A job that has not begun cannot be asked to stop yet.
            asked = asked or head.stop(attempt.job)
            attempt = head.attempt(attempt.job)
        except NoAnswerError:
            continue  # until the deadline
    typer.echo(f"{attempt.job}: {attempt.state.lower()}")
    try:
        typer.echo(last_words(head.log(attempt.job)))
    except HeadError:
        return  # its end is known, its last words are not
