"""The command line: a user's error ends in one message and exit code 2, never in a traceback.

Exit codes: 0 done, 1 the run failed, 2 the input must be mended, 75 stopped by a signal or a rule of health: the
same command goes on from the newest checkpoint.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from deploy.session import shut_in

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again

app = typer.Typer(
    name="python -m deploy",
    help="Paceline: asynchronous reinforcement learning of language models on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe's YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides such as staleness.max_staleness=0.")
]


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

    with _user_errors():
        loaded = load_recipe(recipe, overrides or ())
    address = _ray_address(address)
    from actors.errors import RunError, StoppedError
    from deploy.stopping import heard

    try:
        with heard():
            # After the recipe is known to be good: these load Ray and torch, which takes seconds.
            from rich.console import Console

            from deploy.train import execute, prepare

            with _user_errors():
                jobs = prepare(loaded, recipe, address, overwrite, allow_change or ())
            execute(jobs, address, Console())
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

    with _user_errors():
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

    with _user_errors():
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

    with _user_errors():
        loaded = simulated(load_recipe(recipe, overrides or ()))
        if plot is not None:
            check_plot(plot)
        if save is not None and calibrate is None:
            raise ValueError("--save writes what --calibrate has fitted; add --calibrate RUN_DIR")
        if calibrate is not None:
            loaded = calibrated(loaded, calibrate, save)
        show(loaded, plot)


@app.command()
def manifest(
    recipe: RecipeFile,
    image: Annotated[str, typer.Option(help="Container image that holds this project (deploy/Dockerfile).")],
    overrides: Overrides = None,
    kind: Annotated[str, typer.Option(help="job (a RayJob) or cluster (a RayCluster to submit to).")] = "job",
    name: Annotated[str | None, typer.Option(help="Name in Kubernetes [the recipe's].")] = None,
    namespace: Annotated[str | None, typer.Option(help="Namespace in Kubernetes.")] = None,
    claim: Annotated[str, typer.Option(help="PersistentVolumeClaim of the run folders.")] = "paceline-runs",
    mount: Annotated[str, typer.Option(help="Where the pods see it.")] = "/app/runs",
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Most GPUs of a pod.")] = 8,
    cpus_per_node: Annotated[float, typer.Option(min=1.0, help="Most CPUs of a pod.")] = 32.0,
    memory_per_gpu_gb: Annotated[int, typer.Option(min=1, help="Host memory of a pod for each of its GPUs.")] = 64,
    memory_gb: Annotated[int, typer.Option(min=1, help="Host memory of the head, and of pods without GPUs.")] = 16,
    checkpoint_grace_s: Annotated[
        int, typer.Option(min=60, help="Time that a run has to leave a checkpoint when its pods are to end.")
    ] = 600,
    ttl_s: Annotated[int, typer.Option(min=0, help="How long a finished job's cluster is kept.")] = 600,
    retries: Annotated[int, typer.Option(min=0, help="New clusters on which a failed job goes on.")] = 1,
    kueue: Annotated[str | None, typer.Option(metavar="QUEUE", help="Kueue's local queue.")] = None,
    volcano: Annotated[str | None, typer.Option(metavar="QUEUE", help="Volcano's queue.")] = None,
    elastic_rollout: Annotated[
        str | None, typer.Option(metavar="MIN..MAX", help="Let the autoscaler replace and add rollout pods.")
    ] = None,
    token_secret: Annotated[
        str | None, typer.Option(help="Secret with Ray's token under auth_token; without it KubeRay makes one.")
    ] = None,
    secret_env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=SECRET:KEY", help="Environment variable from a Secret.")
    ] = None,
    node_selector: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Label of the nodes with GPUs.")
    ] = None,
    sidecar: Annotated[bool, typer.Option("--sidecar", help="Submit from the head's pod, not from a Job.")] = False,
) -> None:
    """Write the recipe's run as a KubeRay manifest: a group of pods for each pool, the run folder on a volume."""
    from actors.recipe.file import load_recipe
    from deploy.manifest.options import ManifestOptions, parse_elastic, parse_kind, parse_labels, parse_secret_env
    from deploy.manifest.render import manifest_text, ray_version

    with _user_errors():
        options = ManifestOptions(
            image=image,
            kind=parse_kind(kind),
            name=name,
            namespace=namespace,
            claim=claim,
            mount=mount,
            gpus_per_node=gpus_per_node,
            cpus_per_node=cpus_per_node,
            memory_per_gpu_gb=memory_per_gpu_gb,
            memory_gb=memory_gb,
            checkpoint_grace_s=checkpoint_grace_s,
            ttl_s=ttl_s,
            retries=retries,
            kueue=kueue,
            volcano=volcano,
            elastic=parse_elastic(elastic_rollout),
            token_secret=token_secret,
            secret_env=parse_secret_env(secret_env or ()),
            node_selector=parse_labels(node_selector or ()),
            submission="SidecarMode" if sidecar else "K8sJobMode",
        )
        loaded = load_recipe(recipe, overrides or ())
        typer.echo(manifest_text(loaded, recipe, overrides or (), options, ray_version()), nl=False)


ClusterAddress = Annotated[
    str | None,
    typer.Option(metavar="http://HEAD:8265", help="The cluster's dashboard; without it RAY_API_SERVER_ADDRESS."),
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="The run's name: the recipe's `name`.")]


@app.command()
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

    with _user_errors():
        loaded = load_recipe(recipe, overrides or ())
        address = _cluster(address)
        from deploy.jobs.submit import SubmitOptions, submit

        options = SubmitOptions(env or (), secret or (), not no_wait, overwrite, allow_change or (), stop_wait_s)
        with _run_errors():
            raise typer.Exit(submit(loaded, recipe, overrides or (), address, options))


@app.command()
def status(run: Annotated[str | None, typer.Argument(metavar="RUN")] = None, address: ClusterAddress = None) -> None:
    """Show the runs of a cluster, or every attempt of one."""
    from deploy.jobs.attempts import check_name

    with _user_errors():
        name = None if run is None else check_name(run)
        address = _cluster(address)
        from rich.console import Console

        from deploy.jobs.head import Head
        from deploy.jobs.status import status

        status(Head(address), name, Console())


@app.command()
def logs(
    run: RunName,
    address: ClusterAddress = None,
    no_follow: Annotated[bool, typer.Option("--no-follow", help="Only what is there.")] = False,
) -> None:
    """Watch a run on a cluster; Ctrl-C leaves it running. The exit code is the run's."""
    from deploy.jobs.attempts import check_name

    with _user_errors():
        name, address = check_name(run), _cluster(address)
        from deploy.jobs.head import Head
        from deploy.jobs.status import known
        from deploy.jobs.submit import watch

        head = Head(address)
        attempt = known(name, head.attempts())[-1]
        if no_follow:
            typer.echo(head.log(attempt.job), nl=False)
            return
        with _run_errors():
            raise typer.Exit(watch(head, attempt))


@app.command()
def stop(run: RunName, address: ClusterAddress = None) -> None:
    """Ask a run on a cluster to stop, and wait until it has left a checkpoint."""
    from deploy.jobs.attempts import check_name

    with _user_errors():
        name, address = check_name(run), _cluster(address)
        from deploy.jobs.head import Head
        from deploy.jobs.stop import stop

        with _run_errors():
            stop(Head(address), name)


@app.command()
def ledger(run_dir: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")]) -> None:
    """Prove from a run's journal that every prompt group has one fate, and show what was sampled in vain."""
    from deploy.ledger import show

    with _user_errors():
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
    from actors.errors import RunError
    from deploy.scale import scale as scale_run

    with _user_errors():
        try:
            typer.echo(scale_run(run_dir, wish, timeout_s))
        except RunError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


@app.command()
def tiny_model(
    out_dir: Annotated[Path, typer.Argument(help="Folder for the model, in Hugging Face layout.")],
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
) -> None:
    """Write the byte-level model with random weights that demos and tests use."""
    from actors.model.tiny import make_tiny_model
    from actors.recipe.model import TinyModel

    with _user_errors():
        make_tiny_model(TinyModel(kind="tiny"), out_dir, seed)
    typer.echo(f"wrote {out_dir}")


def _ray_address(given: str | None) -> str | None:
    """The cluster to join; None for a Ray of our own, which is shut in before Ray is loaded and looks for it."""
    address = given or os.environ.get("RAY_ADDRESS")
    if address is None or address == "local":  # Ray's word for a Ray of one's own
        shut_in(os.environ)
        return None
    return address


@contextmanager
def _user_errors() -> Iterator[None]:
    """A ValueError is for the user to mend and is printed; all else keeps its traceback."""
    try:
        yield
    except ValueError as error:
        first, *others = str(error).splitlines() or [repr(error)]
        typer.echo("\n".join([f"error: {first}", *(f"       {line}" for line in others)]), err=True)
        raise typer.Exit(2) from None


def _cluster(address: str | None) -> str:
    """Where the jobs go; what Ray reads from the environment when it is loaded is as it should be then."""
    from deploy.jobs.address import show_token, take_address

    show_token(os.environ)
    return take_address(address, os.environ)


@contextmanager
def _run_errors() -> Iterator[None]:
    """A RunError is one sentence."""
    from actors.errors import RunError

    try:
        yield
    except RunError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
