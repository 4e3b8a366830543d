"""What KubeRay's operator refuses, or does not do, although its schema takes it: one sentence for each rule broken.

The rules are those of KubeRay 1.7's own validation, of Kueue's, and a few of ours: a manifest that breaks one of those
would start, and lose a run.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from deploy.manifest.inputs import DNS_1035, MAX_NAME

Tree = Mapping[str, Any]

_START_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
_OLDEST_WITH_TOKENS = (2, 52)
_OLDEST_WITH_PRIORITY = (2, 56)
_DELETED_IN_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
_MAX_GROUPS_OF_KUEUE = 7  # a workload has eight kinds of pods, and the head is one
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY|CREDENTIAL")


def broken_rules(manifest: Tree) -> list[str]:
    """Every rule that the RayJob or RayCluster breaks; none for one that KubeRay takes."""
    spec = manifest["spec"]
    problems = [*_metadata(manifest)]
    if manifest["kind"] == "RayJob":
        problems += [*_job(spec), *_submission(spec), *_deletion(spec)]
    cluster = spec.get("rayClusterSpec") if manifest["kind"] == "RayJob" else spec
    if cluster is not None:
        problems += [*_cluster(cluster), *_groups(cluster), *_autoscaling(cluster)]
        problems += [problem for name, group in _named(cluster) for problem in _pod(name, group["template"]["spec"])]
        if "kueue.x-k8s.io/queue-name" in manifest["metadata"].get("labels", {}):
            problems += _kueue(manifest, cluster)
    return problems


def _metadata(manifest: Tree) -> Iterator[str]:
    name, kind = manifest["metadata"]["name"], manifest["kind"]
    longest = MAX_NAME[kind.removeprefix("Ray").lower()]
    if len(name) > longest:
        yield f"metadata.name: {len(name)} characters, and a {kind} has {longest} at most"
    if not DNS_1035.fullmatch(name):
        yield f"metadata.name: {name!r} is not a DNS-1035 label: a letter first, then letters, digits and dashes"


def _job(spec: Tree) -> Iterator[str]:
    selects = bool(spec.get("clusterSelector"))
    if selects == ("rayClusterSpec" in spec):
        yield "spec: exactly one of rayClusterSpec and clusterSelector is given"
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield "spec.suspend: needs shutdownAfterJobFinishes"
    if spec.get("suspend") and selects:
        yield "spec.suspend: a cluster that is selected cannot be suspended"
    if spec.get("ttlSecondsAfterFinished", 0) < 0:
        yield "spec.ttlSecondsAfterFinished: is not negative"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not spec.get("shutdownAfterJobFinishes"):
        yield "spec.ttlSecondsAfterFinished: needs shutdownAfterJobFinishes"
    if spec.get("backoffLimit", 0) < 0:
        yield "spec.backoffLimit: is not negative"
    if spec.get("backoffLimit", 0) > 0 and selects:
        yield "spec.backoffLimit: a cluster that is selected is not made again"
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(key, 1) <= 0:
            yield f"spec.{key}: is above 0"


def _submission(spec: Tree) -> Iterator[str]:
    match spec.get("submissionMode", "K8sJobMode"):
        case "InteractiveMode" if spec.get("backoffLimit", 0) > 0:
            yield "spec.backoffLimit: nothing is tried again in InteractiveMode"
        case "SidecarMode":
            for key in ("submitterPodTemplate", "submitterConfig", "clusterSelector"):
                if key in spec:
                    yield f"spec.{key}: SidecarMode has none"
            head = spec.get("rayClusterSpec", {}).get("headGroupSpec", {}).get("template", {}).get("spec", {})
            if head.get("restartPolicy", "Never") != "Never":
                yield "spec.rayClusterSpec.headGroupSpec: SidecarMode needs the head's restartPolicy Never"
        case "K8sJobMode" | "HTTPMode" | "InteractiveMode":
            pass
        case other:
            yield f"spec.submissionMode: there is no {other!r}"


def _deletion(spec: Tree) -> Iterator[str]:
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    rules = strategy.get("deletionRules", [])
    if rules and spec.get("shutdownAfterJobFinishes"):
        yield "spec.deletionStrategy.deletionRules: not together with shutdownAfterJobFinishes"
    if rules and ("onSuccess" in strategy or "onFailure" in strategy):
        yield "spec.deletionStrategy: deletionRules, or onSuccess and onFailure, not all"
    if not rules and not ("onSuccess" in strategy and "onFailure" in strategy):
        yield "spec.deletionStrategy: needs deletionRules, or onSuccess and onFailure"
    waits: dict[str, dict[str, int]] = {}
    for rule in rules:
        condition = rule["condition"]
        known = waits.setdefault(condition.get("jobStatus", ""), {})
        if rule["policy"] in known:
            yield f"spec.deletionStrategy.deletionRules: {rule['policy']} twice for one status"
        known[rule["policy"]] = condition.get("ttlSeconds", 0)
        if known[rule["policy"]] < 0:
            yield "spec.deletionStrategy.deletionRules: ttlSeconds is not negative"
    for known in waits.values():
        in_order = [known[policy] for policy in _DELETED_IN_ORDER if policy in known]
        if in_order != sorted(in_order):
            yield "spec.deletionStrategy.deletionRules: workers go before the cluster, and that before the job"


def _cluster(cluster: Tree) -> Iterator[str]:
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "authOptions.mode: token, or whoever reaches the pods runs code there"
    elif _version(cluster) < _OLDEST_WITH_TOKENS:
        yield "rayVersion: token authentication needs Ray 2.52 or later, said as rayVersion"
    start = cluster["headGroupSpec"].get("rayStartParams", {})
    if start.get("num-cpus") != "0" or start.get("num-gpus", "0") != "0":
        yield 'headGroupSpec.rayStartParams: num-cpus is "0" and there is no GPU: workers belong on the pools\' pods'


def _version(cluster: Tree) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)", cluster.get("rayVersion", ""))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _named(cluster: Tree) -> list[tuple[str, Tree]]:
    workers = [(f"group {group['groupName']!r}", group) for group in cluster.get("workerGroupSpecs", [])]
    return [("the head group", cluster["headGroupSpec"]), *workers]


def _groups(cluster: Tree) -> Iterator[str]:
    names = [group["groupName"] for group in cluster.get("workerGroupSpecs", [])]
    if len(set(names)) < len(names):
        yield "workerGroupSpecs: two groups bear one name"
    for name, group in _named(cluster):
        start = group.get("rayStartParams", {})
        if group.get("resources") and any(key in start for key in _START_RESOURCES):
            yield f"{name}: resources are given in rayStartParams and beside them; give them in one place"
        if "labels" in start:
            yield f"{name}: labels stand beside rayStartParams, not in them"
    for name, group in _named(cluster)[1:]:
        yield from _sizes(name, group)
        limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
        for key, limit in (("num-cpus", "cpu"), ("num-gpus", "nvidia.com/gpu"), ("memory", "memory")):
            if key in group.get("rayStartParams", {}) and limit in limits:
                yield f"{name}: {limit} is given by rayStartParams and by the container; leave it to the container"
        for resource in group.get("resources", {}):
            if resource.lower() in ("cpu", "memory") or resource.lower().endswith("gpu"):
                yield f"{name}: the custom resource {resource!r} would be taken for CPUs, GPUs or memory; rename it"


def _sizes(name: str, group: Tree) -> Iterator[str]:
    if "minReplicas" not in group or "maxReplicas" not in group:
        yield f"{name}: needs minReplicas and maxReplicas"
    elif not group["minReplicas"] <= group.get("replicas", group["minReplicas"]) <= group["maxReplicas"]:
        yield f"{name}: replicas lies between minReplicas and maxReplicas"
    elif group["groupName"] != "rollout" and group["minReplicas"] != group["maxReplicas"]:
        yield f"{name}: only rollout replicas come and go; minReplicas is maxReplicas"


def _autoscaling(cluster: Tree) -> Iterator[str]:
    scales = bool(cluster.get("enableInTreeAutoscaling"))
    is_v2 = scales and cluster.get("autoscalerOptions", {}).get("version") == "v2"
    if scales and not is_v2:
        yield "autoscalerOptions.version: v2, the one that knows placement groups' custom resources"
    for name, group in _named(cluster):
        if is_v2 and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield f"{name}: autoscaler v2 needs restartPolicy Never"
        if "priority" in group and not (is_v2 and _version(cluster) >= _OLDEST_WITH_PRIORITY):
            yield f"{name}: priority needs autoscaler v2 and Ray 2.56"
        if scales and group.get("suspend"):
            yield f"{name}: a group is not suspended while the autoscaler is on"
        if not scales and group.get("minReplicas") != group.get("maxReplicas"):
            yield f"{name}: without enableInTreeAutoscaling minReplicas is maxReplicas"


def _pod(name: str, pod: Tree) -> Iterator[str]:
    container = pod["containers"][0]
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    mounts = {mount["mountPath"]: volumes.get(mount["name"]) for mount in container.get("volumeMounts", [])}
    if None in mounts.values():
        yield f"{name}: a volume is mounted that the pod has not"
    if ((mounts.get("/dev/shm") or {}).get("emptyDir") or {}).get("medium") != "Memory":
        yield f"{name}: /dev/shm is an emptyDir in memory: a container's own has 64 MiB"
    if not any(volume and "persistentVolumeClaim" in volume for volume in mounts.values()):
        yield f"{name}: the run folder's volume is not mounted"
    if pod.get("terminationGracePeriodSeconds", 30) < _stop_s(container):
        yield f"{name}: terminationGracePeriodSeconds is shorter than its preStop may take"
    for entry in container.get("env", []):
        if "value" in entry and _SECRET_NAME.search(entry["name"]):
            yield f"{name}: {entry['name']} is written out; take it from a Secret (valueFrom.secretKeyRef)"
    resources = container.get("resources", {})
    if resources.get("requests", {}).get("nvidia.com/gpu") != resources.get("limits", {}).get("nvidia.com/gpu"):
        yield f"{name}: GPUs are requested as they are limited"


def _stop_s(container: Tree) -> float:
    """How long the pod's preStop may take, by its own command."""
    command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
    return max((float(word) for word in command if word.isdecimal()), default=0.0)


def _kueue(manifest: Tree, cluster: Tree) -> Iterator[str]:
    if cluster.get("enableInTreeAutoscaling"):
        yield "enableInTreeAutoscaling: Kueue admits a job whole, and takes none that scales by itself"
    if not manifest["spec"].get("suspend"):
        yield "spec.suspend: true, until Kueue has room for it"
    if manifest["kind"] == "RayJob" and not manifest["spec"].get("shutdownAfterJobFinishes"):
        yield "spec.shutdownAfterJobFinishes: true, or Kueue counts its pods for ever"
    if len(cluster.get("workerGroupSpecs", [])) > _MAX_GROUPS_OF_KUEUE:
        yield f"workerGroupSpecs: Kueue takes {_MAX_GROUPS_OF_KUEUE} at most"
