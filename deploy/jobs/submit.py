"""The submit verb: nothing is sent that cannot run, and a run never runs twice."""

import asyncio
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from actors.recipe.schema import Recipe
from deploy.jobs.attempts import Attempt, next_number, of_run
from deploy.jobs.head import Head, TakenError
from deploy.jobs.inputs import (
    Runs,
    all_runs,
    check_as_train,
    check_room,
    check_run_dirs,
    check_sent,
    elsewhere,
    recipe_name,
)
from deploy.jobs.shipment import Shipment, pack
from deploy.jobs.variables import STOP_WAIT, command_line, secrets, settings
from deploy.jobs.watch import follow

DETACHED = 130  # as of a program that Ctrl-C ends


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """What is asked for beside the recipe."""

    env: Sequence[str] = ()
    secret: Sequence[str] = ()
    wait: bool = True
    overwrite: bool = False
    allow_change: Sequence[str] = ()
    stop_wait_s: int = 600


@dataclass(frozen=True, slots=True)
class Order:
    """All that a cluster is told of a run."""

    run: str
    run_dir: str
    command: str
    env: dict[str, str]
    shipment: Shipment
    overwrite: bool


def submit(recipe: Recipe, path: str, overrides: Sequence[str], address: str, options: SubmitOptions) -> int:
    """The exit code of the run, or 0 when it is not waited for; ValueError before anything is sent."""
    root = Path.cwd()
    env = settings(options.env, os.environ) | {STOP_WAIT: str(options.stop_wait_s)}
    named = secrets(options.secret)
    name = recipe_name(path, root)
    runs = all_runs(recipe, name)
    check_run_dirs(runs)
    shipment = pack(root)
    check_sent(runs, shipment)
    if not shipment.has("deploy/__main__.py"):
        typer.echo(f"note: {root} is not Paceline's checkout, so the cluster must have Paceline on its PYTHONPATH")
    head = Head(address)  # before what takes longer
    check_room(runs, head.cluster())
    words = ["python", "-m", "deploy", "train", name, *overrides, *_flags(options)]
    order = Order(recipe.name, str(recipe.folder), command_line(words, named), env, shipment, options.overwrite)
    attempt = under_way(head, order)
    if attempt is None:
        _check_here(runs, options)
        attempt = _send(head, order)
    if not options.wait:
        typer.echo(_how_to(attempt, head.address))
        return 0
    return watch(head, attempt)


def under_way(head: Head, order: Order) -> Attempt | None:
    """The attempt that runs already; ValueError when it, or another run in the same folder, is not the same."""
    attempts = head.attempts()
    for other in attempts:
        if other.under_way and other.run != order.run and other.run_dir == order.run_dir:
            raise ValueError(
                f"run_dir: {order.run_dir} is what {other.job!r} trains in on this cluster; choose another run_dir, or "
                f"stop it first: {_verb('stop', other.run, head.address)}"
            )
    mine = of_run(order.run, attempts)
    running = next((each for each in reversed(mine) if each.under_way), None)
    if running is None:
        _check_not_done(mine, order)
        return None
    if running.command != order.command:
        raise ValueError(
            f"name: {order.run!r} is under way on this cluster with another command:\n  {running.command}\n"
            f"choose another name=..., or stop it first: {_verb('stop', order.run, head.address)}"
        )
    typer.echo(f"{running.job} is {running.state.lower()} already")
    return running


def watch(head: Head, attempt: Attempt) -> int:
    """Write what the run prints until it ends; Ctrl-C leaves it running."""
    try:
        ended = asyncio.run(follow(head, attempt.job, _write))
    except KeyboardInterrupt:
        typer.echo(f"\ndetached: the run goes on\n{_how_to(attempt, head.address)}", err=True)
        return DETACHED
    code = ended.exit_code
    assert code is not None, "a job that has ended has an exit code"
    if ended.driver_exit_code is None and ended.state == "FAILED":
        typer.echo(f"error: the cluster lost {ended.job}: {ended.message.strip()}", err=True)
    typer.echo(f"{ended.job}: {ended.state.lower()}, exit code {code}")
    return code


def _check_here(runs: Runs, options: SubmitOptions) -> None:
    """What `train` would refuse, as far as this machine has what the recipes name."""
    if unseen := elsewhere(runs):
        typer.echo(f"not on this machine, so the cluster will check the recipe's data and models: {', '.join(unseen)}")
        return
    path, recipe = runs[-1]
    check_as_train(recipe, path, options.overwrite, options.allow_change)


def _check_not_done(mine: Sequence[Attempt], order: Order) -> None:
    last = mine[-1] if mine else None
    if last is None or last.state != "SUCCEEDED" or last.run_dir != order.run_dir or order.overwrite:
        return
    raise ValueError(
        f"name: {order.run!r} has finished on this cluster, and left {order.run_dir}; choose another name=... and "
        "run_dir=..., or begin anew with --overwrite"
    )


def _send(head: Head, order: Order) -> Attempt:
    """A new attempt; or that of somebody who submitted the same at the same moment."""
    number = next_number(of_run(order.run, head.attempts()))
    shipment = order.shipment
    typer.echo(f"sending {len(shipment.sizes)} files, {shipment.num_bytes / 10**6:.1f} MB, of {shipment.root}")
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "project.zip"
        shipment.write(archive)
        try:
            job = head.submit(order.run, number, order.command, order.run_dir, archive, order.env)
        except TakenError:
            running = under_way(head, order)
            if running is None:
                raise
            return running
    again = f"; attempt {number} goes on from what the others have left in {order.run_dir}" if number > 1 else ""
    typer.echo(f"submitted {job}{again}")
    return head.attempt(job)


def _flags(options: SubmitOptions) -> list[str]:
    changed = [word for key in options.allow_change for word in ("--allow-change", key)]
    return [*(["--overwrite"] if options.overwrite else []), *changed]


def _write(text: str) -> None:
    typer.echo(text, nl=False)


def _verb(verb: str, run: str, address: str) -> str:
    return f"python -m deploy {verb} {run} --address {address}"


def _how_to(attempt: Attempt, address: str) -> str:
    """What to type next."""
    verbs = (("watch", "logs"), ("stop", "stop"), ("state", "status"))
    return "\n".join(f"{what}: {_verb(verb, attempt.run, address)}" for what, verb in verbs)
