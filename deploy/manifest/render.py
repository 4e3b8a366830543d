"""A manifest is the recipe's run on Kubernetes: the same command, on a group of pods for each pool."""

import importlib.metadata
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import yaml

from actors.recipe.schema import GrpoRecipe, Recipe
from actors.run.lineage import trained_before
from deploy.host_memory import check_pods
from deploy.manifest.groups import PodGroup, bindings, pod_groups
from deploy.manifest.inputs import check_name, check_paths
from deploy.manifest.options import APP, Elastic, ManifestOptions
from deploy.manifest.pods import head_pod, worker_pod
from deploy.manifest.rules import broken_rules

API = "ray.io/v1"
_IDLE_S = 900
"""Longer than an engine takes to start: a pod that waits for the others is not idle."""


def ray_version() -> str:
    """Ray's, as it is pinned here and in the image."""
    return importlib.metadata.version("ray")


def manifest_text(
    recipe: Recipe, path: str, overrides: Sequence[str], options: ManifestOptions, ray_version: str
) -> str:
    """The manifest as YAML, with how to use it in comments; ValueError names what must be mended."""
    manifest = render(recipe, path, overrides, options, ray_version)
    # A rule that is broken here is an error of ours, or of a value that the recipe and the options let through.
    if broken := broken_rules(manifest):
        raise ValueError("KubeRay would refuse this manifest:\n" + "\n".join(broken))
    name = manifest["metadata"]["name"]
    lines = [f"# {manifest['kind']} '{name}' of {path}; the claim '{options.claim}' must be there, readable and"]
    lines.append("# writable from many nodes. Save this as a file, then: kubectl apply -f FILE")
    if options.kind == "cluster":
        lines += [f"# {line}" for line in _how_to_submit(recipe, path, overrides, options)]
    return "\n".join(lines) + "\n" + yaml.safe_dump(manifest, sort_keys=False, width=120)


def render(
    recipe: Recipe, path: str, overrides: Sequence[str], options: ManifestOptions, ray_version: str
) -> dict[str, Any]:
    """The manifest as plain data."""
    options = _with_range(recipe, options)
    name = check_name(options.name or recipe.name, options.kind, given=options.name is not None)
    before = trained_before(recipe, path)
    for where, each in (*before, (path, recipe)):
        check_paths(each, where, options.mount, options.claim)
    groups = _groups(recipe, path, options)
    cluster = _cluster(groups, options, ray_version)
    match options.kind:
        case "cluster":
            kind, spec = "RayCluster", cluster | _suspended(options)
        case "job":
            kind, spec = "RayJob", _job(cluster, _command(recipe, path, overrides, options), options)
    return {"apiVersion": API, "kind": kind, "metadata": _metadata(name, options), "spec": spec}


def _with_range(recipe: Recipe, options: ManifestOptions) -> ManifestOptions:
    """A recipe whose replicas come and go says itself between which numbers."""
    pool = recipe.pools.rollout
    if not isinstance(recipe, GrpoRecipe):
        if options.elastic is not None:
            raise ValueError(
                f"--elastic-rollout: a recipe of kind {recipe.kind!r} has no rollout replicas; leave it out"
            )
        return options
    if options.elastic is not None and pool.colocate_with is not None:
        raise ValueError(
            "--elastic-rollout: the replicas lie on the policy's GPUs (pools.rollout.colocate_with), and have no pods "
            "that could come and go; leave it out"
        )
    if not pool.elastic:
        return options
    asked = Elastic(pool.least, pool.most)
    if options.kueue is not None:
        raise ValueError(
            "--kueue: Kueue admits a job whole and takes none that scales by itself; leave it out, or "
            "pools.rollout.min_workers and max_workers"
        )
    if options.elastic not in (None, asked):
        raise ValueError(
            f"--elastic-rollout: the recipe says {asked.least}..{asked.most} (min_workers and max_workers of "
            "pools.rollout); leave the option out"
        )
    return replace(options, elastic=asked)


def _groups(recipe: Recipe, path: str, options: ManifestOptions) -> tuple[PodGroup, ...]:
    groups = pod_groups([*(first for _, first in trained_before(recipe, path)), recipe], options)
    check_pods(recipe, groups, options)
    return groups


def _command(recipe: Recipe, path: str, overrides: Sequence[str], options: ManifestOptions) -> list[str]:
    return ["python", "-m", "deploy", "train", path, *overrides, *bindings(recipe, _groups(recipe, path, options))]


def _how_to_submit(recipe: Recipe, path: str, overrides: Sequence[str], options: ManifestOptions) -> Iterator[str]:
    """A job that is submitted runs in a copy of the folder here, in which a relative run_dir would be lost."""
    for where, first in trained_before(recipe, path):
        if not first.folder.is_absolute():
            yield f"first write run_dir: {_in_pod(first)} into {where}, which is trained before"
    bound = bindings(recipe, _groups(recipe, path, options))
    folder = [] if recipe.folder.is_absolute() else [f"run_dir={_in_pod(recipe)}"]
    address = ["--address", "http://127.0.0.1:8265"]
    words = ["python", "-m", "deploy", "submit", path, *overrides, *bound, *folder, *address]
    yield f"then, with the token exported and the dashboard's port forwarded (docs/kuberay.md): {shlex.join(words)}"


def _in_pod(recipe: Recipe) -> PurePosixPath:
    """Where a relative run folder lies."""
    return PurePosixPath(APP) / recipe.folder


def _metadata(name: str, options: ManifestOptions) -> dict[str, Any]:
    labels = {"app.kubernetes.io/part-of": "paceline"}
    if options.kueue is not None:
        labels["kueue.x-k8s.io/queue-name"] = options.kueue
    if options.volcano is not None:
        labels |= {"ray.io/scheduler-name": "volcano", "volcano.sh/queue-name": options.volcano}
    namespace = {} if options.namespace is None else {"namespace": options.namespace}
    return {"name": name, **namespace, "labels": labels}


def _suspended(options: ManifestOptions) -> dict[str, Any]:
    """Kueue lets it go when there is room for all of it."""
    return {"suspend": True} if options.kueue is not None else {}


def _job(cluster: dict[str, Any], command: list[str], options: ManifestOptions) -> dict[str, Any]:
    """A job that failed is given the same command again on a new cluster: the run goes on from its last checkpoint."""
    return {
        **_suspended(options),
        "submissionMode": options.submission,
        "entrypoint": shlex.join(command),
        # Names and places alone: Ray keeps and shows this. Secrets come to the pods from the cluster.
        "runtimeEnvYAML": yaml.safe_dump({"env_vars": {"PYTHONPATH": APP}}),
        "backoffLimit": options.retries,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": options.ttl_s,
        "rayClusterSpec": cluster,
    }


def _cluster(groups: Sequence[PodGroup], options: ManifestOptions, ray_version: str) -> dict[str, Any]:
    secret = {} if options.token_secret is None else {"secretName": options.token_secret}
    scaling: dict[str, Any] = {}
    if options.elastic is not None:
        scaler = {"version": "v2", "idleTimeoutSeconds": _IDLE_S}
        scaling = {"enableInTreeAutoscaling": True, "autoscalerOptions": scaler}
    return {
        "rayVersion": ray_version,
        "authOptions": {"mode": "token", **secret},
        **scaling,
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0", "num-gpus": "0"}, "template": head_pod(options)},
        "workerGroupSpecs": [_worker_group(group, options) for group in groups],
    }


def _worker_group(group: PodGroup, options: ManifestOptions) -> dict[str, Any]:
    """Fixed but for rollouts: the policy's ranks are one NCCL group from the beginning to the end."""
    return {
        "groupName": group.pool,
        "replicas": group.num_pods,
        "minReplicas": group.least,
        "maxReplicas": group.most,
        "rayStartParams": {},  # CPUs, GPUs and memory are the container's; said twice, the two could disagree
        "resources": {group.resource: "1"},
        **({"labels": group.given_labels} if group.given_labels else {}),
        "template": worker_pod(group, options),
    }
