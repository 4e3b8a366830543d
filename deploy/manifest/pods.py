"""Every pod sees the run folder, has shared memory enough, holds no secret's value, and gives a run time to stop."""

import math
from typing import Any

from deploy.manifest.groups import PodGroup
from deploy.manifest.options import APP, ManifestOptions

_MARGIN_S = 30
"""Of the grace period, for what comes after the checkpoint."""
_HEAD_CPUS = 4
GPU = "nvidia.com/gpu"


def head_pod(options: ManifestOptions) -> dict[str, Any]:
    """The head runs the driver and no worker; when it is to end, the run stops first and leaves a checkpoint."""
    waited = options.checkpoint_grace_s - _MARGIN_S
    drain = ["python", "-m", "deploy.drain", "--within-s", str(waited)]
    container = _container("ray-head", options, _HEAD_CPUS, 0, options.memory_gb)
    container["env"].append({"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": str(waited)})
    container["lifecycle"] = {"preStop": {"exec": {"command": drain}}}
    return _pod(options, container, {"paceline/pool": "head"}, options.memory_gb)


def worker_pod(group: PodGroup, options: ManifestOptions) -> dict[str, Any]:
    """Workers that are to end stay while the head answers: the checkpoint needs them."""
    gigabytes = group.gpus * options.memory_per_gpu_gb or options.memory_gb
    container = _container("ray-worker", options, group.cpus, group.gpus, gigabytes)
    wait = 'while ray health-check --address "$RAY_ADDRESS" >/dev/null 2>&1; do sleep 5; done'
    waited = str(options.checkpoint_grace_s - _MARGIN_S)
    container["lifecycle"] = {"preStop": {"exec": {"command": ["timeout", waited, "sh", "-c", wait]}}}
    pod = _pod(options, container, {"paceline/pool": group.pool}, gigabytes)
    spec = pod["spec"]
    spec["automountServiceAccountToken"] = False
    if group.gpus:
        spec["tolerations"] = [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}]
        if options.node_selector:
            spec["nodeSelector"] = dict(options.node_selector)
    return pod


def _pod(options: ManifestOptions, container: dict[str, Any], labels: dict[str, str], gigabytes: int) -> dict[str, Any]:
    shared = math.ceil(gigabytes * 0.4)  # Ray's object store takes 30 % of the memory, worker processes the rest
    return {
        "metadata": {"labels": {"app.kubernetes.io/part-of": "paceline", **labels}},
        "spec": {
            "restartPolicy": "Never",  # half a pod's state is worse than a new pod
            "terminationGracePeriodSeconds": options.checkpoint_grace_s,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 1000,
                "fsGroup": 1000,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": [
                {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shared}Gi"}},
                {"name": "runs", "persistentVolumeClaim": {"claimName": options.claim}},
            ],
        },
    }


def _container(name: str, options: ManifestOptions, cpus: int, gpus: int, gigabytes: int) -> dict[str, Any]:
    resources = {"cpu": str(cpus), "memory": f"{gigabytes}Gi"} | ({GPU: str(gpus)} if gpus else {})
    env: list[dict[str, Any]] = [
        {"name": "PYTHONPATH", "value": APP},
        {"name": "HF_HOME", "value": f"{options.mount}/.huggingface"},
        {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
    ]
    env += [
        {"name": secret.variable, "valueFrom": {"secretKeyRef": {"name": secret.secret, "key": secret.key}}}
        for secret in options.secret_env
    ]
    return {
        "name": name,
        "image": options.image,
        "workingDir": APP,
        "env": env,
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            {"name": "runs", "mountPath": options.mount},
        ],
    }
