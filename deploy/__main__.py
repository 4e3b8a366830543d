"""The command line: a user's error ends in one message and exit code 2, never in a traceback.

Exit codes: 0 done, 1 the run failed, 2 the input must be mended or the cluster has no room for the run, 75 stopped by
a signal or a rule of health: the same command goes on from the newest checkpoint.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from deploy.command import Overrides, RecipeFile, run_errors, user_errors
from deploy.jobs.verbs import logs, status, stop, submit
from deploy.manifest.verb import manifest
from deploy.session import ClusterError, show_token, shut_in

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again

app = typer.Typer(
    name="python -m deploy",
    help="Paceline: asynchronous reinforcement learning of language models on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to join, such as auto; without it RAY_ADDRESS, or else this machine."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run has left.")] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Go on with the run although this key of its recipe has changed."),
    ] = None,
) -> None:
    """Train what the recipe says; a run that was ended before its time goes on from its last checkpoint."""
    from actors.recipe.file import load_recipe

    with user_errors():
        loaded = load_recipe(recipe, overrides or ())
    address = _ray_address(address)
    from actors.errors import RunError, StoppedError
    from deploy.stopping import heard

    try:
        with heard():
            # After the recipe is known to be good: these load Ray and torch, which takes seconds.
            from actors.run.progress import RunConsole
            from deploy.train import execute, prepare

            with user_errors():
                jobs = prepare(loaded, recipe, address, overwrite, allow_change or ())
            with user_errors(ClusterError):  # another ValueError is not the user's any more
                execute(jobs, address, RunConsole())
    except StoppedError as stopped:
        typer.echo(str(stopped), err=True)
        raise typer.Exit(STOPPED) from None
    except RunError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Plan for this many equal nodes, not for this machine.")
    ] = None,
    cpus_per_node: Annotated[float | None, typer.Option(min=0.0, help="CPUs of each of those nodes [32].")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="GPUs of each of those nodes [0].")] = None,
    node_labels: Annotated[
        list[str] | None,
        typer.Option(metavar="[COUNT:]KEY=VALUE", help="Labels of those nodes, or of the next COUNT (repeatable)."),
    ] = None,
    gpu_memory_gb: Annotated[
        float | None, typer.Option(min=1.0, help="Memory of each GPU; a live cluster tells it for most kinds.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Plan for the live Ray cluster at this address.")] = None,
) -> None:
    """Show what the recipe would run, and where, without starting anything."""
    from actors.recipe.file import load_recipe
    from deploy.plan import live_cluster, planned_cluster, show
    from placement.cluster import this_machine

    with user_errors():
        loaded = load_recipe(recipe, overrides or ())
        if nodes is None and (cpus_per_node is not None or gpus_per_node is not None or node_labels):
            raise ValueError(
                "--cpus-per-node, --gpus-per-node and --node-labels describe the nodes of --nodes; add --nodes 1 or "
                "more"
            )
        if nodes is not None and address is not None:
            raise ValueError(
                "--nodes plans for a cluster that is not there, --address for one that is; give one of them"
            )
        if nodes is not None:
            cpus = 32.0 if cpus_per_node is None else cpus_per_node
            cluster = planned_cluster(nodes, cpus, gpus_per_node or 0, node_labels or ())
        else:
            show_token(os.environ)
            cluster = this_machine() if address is None else live_cluster(address)
        show(loaded, cluster, recipe, overrides or (), gpu_memory_gb)


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="The recipe's YAML file.")] = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to look at; without it RAY_ADDRESS, or else this machine.")
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Start an engine, and compare it with the policy.")] = False,
) -> None:
    """Check machine, cluster and all that the recipe names before a run: a line for each, exit code 1 if one fails."""
    from actors.recipe.file import load_recipe
    from actors.recipe.schema import Recipe
    from actors.run.lineage import trained_before

    with user_errors():
        recipes: list[Recipe] = []
        if recipe is not None:
            loaded = load_recipe(recipe, overrides or ())
            recipes = [*(first for _, first in trained_before(loaded, recipe)), loaded]
    address = _ray_address(address)
    try:
        from deploy.doctor.report import show
    except ImportError as error:  # of a package that is not there, or not whole: no check can be made without them
        typer.echo(f"fail  packages  {error}; make install, or on GPUs pip install -r deploy/requirements/gpu.txt")
        raise typer.Exit(1) from None

    if not show(recipes, address, deep):
        raise typer.Exit(1)


@app.command()
def simulate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    plot: Annotated[Path | None, typer.Option(help="Draw utilisation, staleness and splits into this file.")] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="Fit the times to the finished run in this folder, and use them.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write what --calibrate fitted into this file.")] = None,
) -> None:
    """Run the recipe's schedule in virtual time: how fast, how stale, and how to split the workers."""
    from actors.recipe.file import load_recipe
    from deploy.simulate.calibrate import calibrated
    from deploy.simulate.plot import check_plot
    from deploy.simulate.setup import simulated
    from deploy.simulate.verb import show

    with user_errors():
        loaded = simulated(load_recipe(recipe, overrides or ()))
        if plot is not None:
            check_plot(plot)
        if save is not None and calibrate is None:
            raise ValueError("--save writes what --calibrate has fitted; add --calibrate RUN_DIR")
        if calibrate is not None:
            loaded = calibrated(loaded, calibrate, save)
        show(loaded, plot)


app.command()(manifest)
for verb in (submit, status, logs, stop):
    app.command()(verb)


@app.command()
def ledger(run_dir: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")]) -> None:
    """Prove from a run's journal that every prompt group has one fate, and show what was sampled in vain."""
    from deploy.ledger import show

    with user_errors():
        consistent = show(run_dir)
    if not consistent:
        raise typer.Exit(1)


@app.command()
def scale(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run that trains now.")],
    wish: Annotated[str, typer.Argument(metavar="rollout=N", help="How many rollout replicas it is to have.")],
    timeout_s: Annotated[float, typer.Option(min=1.0, help="Longest wait for the run's answer.")] = 60.0,
) -> None:
    """Ask a run for more or fewer rollout replicas, within its recipe's min_workers and max_workers."""
    from deploy.scale import scale as scale_run

    with user_errors(), run_errors():
        typer.echo(scale_run(run_dir, wish, timeout_s))


@app.command()
def tiny_model(
    out_dir: Annotated[Path, typer.Argument(help="Folder for the model, in Hugging Face layout.")],
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
) -> None:
    """Write the byte-level model with random weights that demos and tests use."""
    from actors.model.tiny import make_tiny_model
    from actors.recipe.model import TinyModel

    with user_errors():
        make_tiny_model(TinyModel(kind="tiny"), out_dir, seed)
    typer.echo(f"wrote {out_dir}")


def _ray_address(given: str | None) -> str | None:
    """The cluster to join; None for a Ray of our own, which is shut in before Ray is loaded and looks for it."""
    address = given or os.environ.get("RAY_ADDRESS")
    if address is None or address == "local":  # Ray's word for a Ray of one's own
        shut_in(os.environ)
        return None
    show_token(os.environ)
    return address


if __name__ == "__main__":
    app()
