"""The verbs for runs on a cluster: submit, status, logs and stop."""

import os
from typing import Annotated

import typer

from deploy.command import Overrides, RecipeFile, run_errors, user_errors
from deploy.session import show_token

ClusterAddress = Annotated[
    str | None,
    typer.Option(metavar="http://HEAD:8265", help="The cluster's dashboard; without it RAY_API_SERVER_ADDRESS."),
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="The run's name: the recipe's `name`.")]


def submit(
    recipe: RecipeFile,
    overrides: Overrides = None,
    address: ClusterAddress = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Give the job this variable as it is set here; Ray shows and logs it."),
    ] = None,
    secret: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A variable that the cluster itself must have.")
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not follow the log to the end.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run has left.")] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Go on with the run although this key of its recipe has changed."),
    ] = None,
    stop_wait_s: Annotated[
        int, typer.Option(min=10, help="Time that the run has to leave a checkpoint when it is stopped.")
    ] = 600,
) -> None:
    """Run the recipe on a Ray cluster, from this folder; again, to go on with it. The exit code is the run's."""
    from actors.recipe.file import load_recipe

    with user_errors():
        loaded = load_recipe(recipe, overrides or ())
        address = _cluster(address)
        from deploy.jobs.submit import SubmitOptions, submit

        options = SubmitOptions(env or (), secret or (), not no_wait, overwrite, allow_change or (), stop_wait_s)
        with run_errors():
            raise typer.Exit(submit(loaded, recipe, overrides or (), address, options))


def status(run: Annotated[str | None, typer.Argument(metavar="RUN")] = None, address: ClusterAddress = None) -> None:
    """Show the runs of a cluster, or every attempt of one."""
    from deploy.jobs.attempts import check_name

    with user_errors():
        name = None if run is None else check_name(run)
        address = _cluster(address)
        from rich.console import Console

        from deploy.jobs.head import Head
        from deploy.jobs.status import status

        status(Head(address), name, Console())


def logs(
    run: RunName,
    address: ClusterAddress = None,
    no_follow: Annotated[bool, typer.Option("--no-follow", help="Only what is there.")] = False,
) -> None:
    """Watch a run on a cluster; Ctrl-C leaves it running. The exit code is the run's."""
    from deploy.jobs.attempts import check_name

    with user_errors():
        name, address = check_name(run), _cluster(address)
        from deploy.jobs.head import Head
        from deploy.jobs.status import known
        from deploy.jobs.submit import watch

        head = Head(address)
        attempt = known(name, head.attempts())[-1]
        if no_follow:
            typer.echo(head.log(attempt.job), nl=False)
            return
        with run_errors():
            raise typer.Exit(watch(head, attempt))


def stop(run: RunName, address: ClusterAddress = None) -> None:
    """Ask a run on a cluster to stop, and wait until it has left a checkpoint."""
    from deploy.jobs.attempts import check_name

    with user_errors():
        name, address = check_name(run), _cluster(address)
        from deploy.jobs.head import Head
        from deploy.jobs.stop import stop

        with run_errors():
            stop(Head(address), name)


def _cluster(address: str | None) -> str:
    """Where the jobs go; what Ray reads from the environment when it is loaded is as it should be then."""
    from deploy.jobs.address import take_address

    show_token(os.environ)
    return take_address(address, os.environ)
