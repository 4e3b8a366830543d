"""Each rule finds the manifest that breaks it: mutants of one that breaks none."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.recipe.file import load_recipe
from deploy.manifest.options import Elastic, ManifestOptions
from deploy.manifest.render import render
from deploy.manifest.rules import broken_rules

ROOT = Path(__file__).parents[3]
Tree = dict[str, Any]


def manifest(**options: Any) -> Tree:
    path = str(ROOT / "recipes/qwen2.5_7b_lora.yaml")
    recipe = load_recipe(path, ("name=run",))
    # Under a relative name: a pod sees no folder of this machine.
    return render(recipe, "recipes/run.yaml", (), ManifestOptions(image="i", **options), "2.60.0")


def cluster(tree: Tree) -> Tree:
    return tree["spec"].get("rayClusterSpec", tree["spec"])


def head(tree: Tree) -> Tree:
    return cluster(tree)["headGroupSpec"]


def group(tree: Tree, name: str = "policy") -> Tree:
    return next(group for group in cluster(tree)["workerGroupSpecs"] if group["groupName"] == name)


def container(tree: Tree, name: str = "policy") -> Tree:
    return group(tree, name)["template"]["spec"]["containers"][0]


def rules(*policies: tuple[str, str, int]) -> Tree:
    conditions = [({"jobStatus": status, "ttlSeconds": ttl}, policy) for policy, status, ttl in policies]
    return {"deletionRules": [{"condition": condition, "policy": policy} for condition, policy in conditions]}


def put(at: Callable[[Tree], Tree], **values: Any) -> Callable[[Tree], None]:
    """A mutation that sets keys; dashes are written as underscores."""

    def mutate(tree: Tree) -> None:
        at(tree).update({key.replace("_", "-") if "_" in key else key: value for key, value in values.items()})

    return mutate


def drop(at: Callable[[Tree], Tree], key: str) -> Callable[[Tree], None]:
    def mutate(tree: Tree) -> None:
        del at(tree)[key]

    return mutate


def both(*mutations: Callable[[Tree], None]) -> Callable[[Tree], None]:
    def mutate(tree: Tree) -> None:
        for mutation in mutations:
            mutation(tree)

    return mutate


def spec(tree: Tree) -> Tree:
    return tree["spec"]


def metadata(tree: Tree) -> Tree:
    return tree["metadata"]


def start(tree: Tree) -> Tree:
    return group(tree)["rayStartParams"]


def pod(tree: Tree) -> Tree:
    return group(tree)["template"]["spec"]


NO_TTL = both(drop(spec, "shutdownAfterJobFinishes"), drop(spec, "ttlSecondsAfterFinished"))

MUTANTS: dict[str, tuple[Tree, Callable[[Tree], None], str]] = {
    "a long name": ({}, put(metadata, name="x" * 48), "48 characters, and a RayJob has 47"),
    "a long name of a cluster": ({"kind": "cluster"}, put(metadata, name="x" * 54), "a RayCluster has 53"),
    "a name that begins with a digit": ({}, put(metadata, name="7b"), "not a DNS-1035 label"),
    "a name that ends with a dash": ({}, put(metadata, name="b-"), "not a DNS-1035 label"),
    "a name with a dot": ({}, put(metadata, name="a.b"), "not a DNS-1035 label"),
    "no cluster": ({}, drop(spec, "rayClusterSpec"), "exactly one of rayClusterSpec and clusterSelector"),
    "two clusters": ({}, put(spec, clusterSelector={"ray.io/cluster": "c"}), "exactly one of rayClusterSpec"),
    "retries on a selected cluster": (
        {},
        both(put(spec, clusterSelector={"ray.io/cluster": "c"}), drop(spec, "rayClusterSpec")),
        "backoffLimit: a cluster that is selected",
    ),
    "suspended and kept": (
        {},
        both(put(spec, suspend=True), NO_TTL),
        "spec.suspend: needs shutdownAfterJobFinishes",
    ),
    "suspended and selected": (
        {},
        both(put(spec, suspend=True, clusterSelector={"a": "b"}), drop(spec, "rayClusterSpec")),
        "a cluster that is selected cannot be suspended",
    ),
    "a time to live of a cluster that stays": (
        {},
        put(spec, shutdownAfterJobFinishes=False),
        "ttlSecondsAfterFinished: needs shutdownAfterJobFinishes",
    ),
    "a negative time to live": ({}, put(spec, ttlSecondsAfterFinished=-1), "ttlSecondsAfterFinished: is not negative"),
    "negative retries": ({}, put(spec, backoffLimit=-1), "backoffLimit: is not negative"),
    "no time at all": ({}, put(spec, activeDeadlineSeconds=0), "activeDeadlineSeconds: is above 0"),
    "no time to start": ({}, put(spec, preRunningDeadlineSeconds=0), "preRunningDeadlineSeconds: is above 0"),
    "interactive with retries": ({}, put(spec, submissionMode="InteractiveMode"), "nothing is tried again"),
    "an unknown way to submit": ({}, put(spec, submissionMode="MailMode"), "there is no 'MailMode'"),
    "a sidecar with a template": (
        {"submission": "SidecarMode"},
        put(spec, submitterPodTemplate={}),
        "submitterPodTemplate: SidecarMode has none",
    ),
    "a sidecar with a submitter's settings": (
        {"submission": "SidecarMode"},
        put(spec, submitterConfig={}),
        "submitterConfig: SidecarMode has none",
    ),
    "a sidecar that is started again": (
        {"submission": "SidecarMode"},
        put(lambda tree: head(tree)["template"]["spec"], restartPolicy="Always"),
        "SidecarMode needs the head's restartPolicy Never",
    ),
    "deletion rules beside a shutdown": (
        {},
        put(spec, deletionStrategy=rules(("DeleteSelf", "FAILED", 0))),
        "not together with shutdownAfterJobFinishes",
    ),
    "deletion rules of two kinds": (
        {},
        both(NO_TTL, put(spec, deletionStrategy=rules(("DeleteSelf", "FAILED", 0)) | {"onSuccess": {}})),
        "deletionRules, or onSuccess and onFailure",
    ),
    "half a deletion strategy": ({}, put(spec, deletionStrategy={"onSuccess": {}}), "needs deletionRules, or"),
    "a deletion twice": (
        {},
        both(
            NO_TTL,
            put(spec, deletionStrategy=rules(("DeleteSelf", "FAILED", 0), ("DeleteSelf", "FAILED", 1))),
        ),
        "DeleteSelf twice",
    ),
    "a deletion in the past": (
        {},
        both(NO_TTL, put(spec, deletionStrategy=rules(("DeleteSelf", "FAILED", -1)))),
        "ttlSeconds is not negative",
    ),
    "workers that outlive their cluster": (
        {},
        both(
            NO_TTL,
            put(spec, deletionStrategy=rules(("DeleteWorkers", "FAILED", 9), ("DeleteCluster", "FAILED", 3))),
        ),
        "workers go before the cluster",
    ),
    "an open cluster": ({}, drop(cluster, "authOptions"), "authOptions.mode: token"),
    "authentication switched off": ({}, put(cluster, authOptions={"mode": "disabled"}), "authOptions.mode: token"),
    "no version of Ray": ({}, drop(cluster, "rayVersion"), "token authentication needs Ray 2.52"),
    "a version of Ray without tokens": ({}, put(cluster, rayVersion="2.9.1"), "token authentication needs Ray 2.52"),
    "a head that works": ({}, put(lambda t: head(t)["rayStartParams"], num_cpus="4"), 'num-cpus is "0"'),
    "a head with GPUs": ({}, put(lambda t: head(t)["rayStartParams"], num_gpus="1"), 'num-cpus is "0"'),
    "resources of the head in two places": (
        {},
        put(head, resources={"cpu": "1"}),
        "the head group: resources are given in rayStartParams and beside them",
    ),
    "resources of a group in two places": (
        {},
        put(start, resources="'{\"a\": 1}'"),
        "group 'policy': resources are given in rayStartParams and beside them",
    ),
    "CPUs in rayStartParams and container": (
        {},
        both(drop(group, "resources"), put(start, num_cpus="4")),
        "group 'policy': cpu is given by rayStartParams and by the container",
    ),
    "GPUs in rayStartParams and container": (
        {},
        both(drop(group, "resources"), put(start, num_gpus="4")),
        "group 'policy': nvidia.com/gpu is given by rayStartParams",
    ),
    "labels in rayStartParams": ({}, put(start, labels="a=b"), "labels stand beside rayStartParams"),
    "a resource that is taken for GPUs": ({}, put(group, resources={"my-gpu": "1"}), "'my-gpu' would be taken for"),
    "two groups of one name": ({}, put(group, groupName="rollout"), "two groups bear one name"),
    "no least number": ({}, drop(group, "minReplicas"), "needs minReplicas and maxReplicas"),
    "no largest number": ({}, drop(group, "maxReplicas"), "needs minReplicas and maxReplicas"),
    "more than the most": ({}, put(group, replicas=2), "replicas lies between"),
    "fewer than the least": (
        {"elastic": Elastic(2, 8)},
        put(lambda t: group(t, "rollout"), replicas=1),
        "lies between",
    ),
    "a policy that grows": ({"elastic": Elastic(2, 8)}, put(group, maxReplicas=3), "only rollout replicas come and go"),
    "rollouts that grow by nobody": (
        {},
        put(lambda t: group(t, "rollout"), maxReplicas=3),
        "without enableInTreeAutoscaling minReplicas is maxReplicas",
    ),
    "the old autoscaler": (
        {"elastic": Elastic(2, 8)},
        put(cluster, autoscalerOptions={"version": "v1"}),
        "autoscalerOptions.version: v2",
    ),
    "autoscaler v2 and pods that restart": (
        {"elastic": Elastic(2, 8)},
        put(pod, restartPolicy="Always"),
        "group 'policy': autoscaler v2 needs restartPolicy Never",
    ),
    "a priority without the autoscaler": ({}, put(group, priority=1), "priority needs autoscaler v2 and Ray 2.56"),
    "a priority and an old Ray": (
        {"elastic": Elastic(2, 8)},
        both(put(group, priority=1), put(cluster, rayVersion="2.55.1")),
        "priority needs autoscaler v2 and Ray 2.56",
    ),
    "a suspended group and the autoscaler": (
        {"elastic": Elastic(2, 8)},
        put(group, suspend=True),
        "a group is not suspended while the autoscaler is on",
    ),
    "little shared memory": (
        {},
        lambda tree: container(tree)["volumeMounts"].pop(0),
        "/dev/shm is an emptyDir in memory",
    ),
    "shared memory on a disk": (
        {},
        lambda tree: pod(tree)["volumes"][0].update(emptyDir={}),
        "/dev/shm is an emptyDir in memory",
    ),
    "no run folder": ({}, lambda tree: container(tree)["volumeMounts"].pop(1), "the run folder's volume"),
    "a volume that is not there": ({}, lambda tree: pod(tree)["volumes"].pop(1), "a volume is mounted that"),
    "too little time to stop": ({}, put(pod, terminationGracePeriodSeconds=60), "is shorter than its preStop"),
    "the usual time to stop": ({}, drop(pod, "terminationGracePeriodSeconds"), "is shorter than its preStop"),
    "a secret's value": (
        {},
        lambda tree: container(tree)["env"].append({"name": "HF_TOKEN", "value": "x"}),
        "group 'policy': HF_TOKEN is written out",
    ),
    "GPUs requested otherwise than limited": (
        {},
        lambda tree: container(tree)["resources"]["requests"].update({"nvidia.com/gpu": "1"}),
        "GPUs are requested as they are limited",
    ),
    "Kueue and the autoscaler": (
        {"kueue": "q"},
        put(cluster, enableInTreeAutoscaling=True, autoscalerOptions={"version": "v2"}),
        "Kueue admits a job whole",
    ),
    "Kueue and a job that is not suspended": ({"kueue": "q"}, drop(spec, "suspend"), "until Kueue has room"),
    "Kueue and a cluster that stays": ({"kueue": "q"}, NO_TTL, "or Kueue counts its pods for ever"),
    "Kueue and many groups": (
        {"kueue": "q"},
        lambda tree: cluster(tree).update(workerGroupSpecs=[dict(group(tree), groupName=f"g{i}") for i in range(8)]),
        "Kueue takes 7 at most",
    ),
}


@pytest.mark.parametrize("options", [{}, {"kind": "cluster"}, {"submission": "SidecarMode"}, {"kueue": "q"}])
def test_what_is_rendered_breaks_no_rule(options: Tree) -> None:
    assert broken_rules(manifest(**options)) == []


@pytest.mark.parametrize("name", MUTANTS)
def test_a_manifest_that_breaks_a_rule_is_found(name: str) -> None:
    options, mutate, problem = MUTANTS[name]
    mutant = copy.deepcopy(manifest(**options))
    mutate(mutant)
    assert any(problem in found for found in broken_rules(mutant)), broken_rules(mutant)
