"""The manifest verb: its options as they are written on the command line."""

from typing import Annotated

import typer

from deploy.command import Overrides, RecipeFile, user_errors


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

    with user_errors():
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
