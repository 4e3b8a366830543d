"""What is asked of a manifest beside its recipe; a value that cannot be used is one ValueError naming its option."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

APP = "/app"
"""Where the image holds this project: WORKDIR of `deploy/Dockerfile`."""

Kind = Literal["job", "cluster"]
Submission = Literal["K8sJobMode", "SidecarMode"]


@dataclass(frozen=True, slots=True)
class SecretEnv:
    """An environment variable whose value only the cluster knows."""

    variable: str
    secret: str
    key: str


@dataclass(frozen=True, slots=True)
class Elastic:
    """Fewest and most pods of the rollout group; each holds one replica."""

    least: int
    most: int


@dataclass(frozen=True, slots=True)
class ManifestOptions:
    """The options of the verb, parsed."""

    image: str
    kind: Kind = "job"
    name: str | None = None
    namespace: str | None = None
    claim: str = "paceline-runs"
    mount: str = f"{APP}/runs"
    gpus_per_node: int = 8
    cpus_per_node: float = 32.0
    memory_per_gpu_gb: int = 64
    memory_gb: int = 16
    checkpoint_grace_s: int = 600
    ttl_s: int = 600
    retries: int = 1
    kueue: str | None = None
    volcano: str | None = None
    elastic: Elastic | None = None
    token_secret: str | None = None
    secret_env: tuple[SecretEnv, ...] = ()
    node_selector: tuple[tuple[str, str], ...] = ()
    submission: Submission = "K8sJobMode"

    def __post_init__(self) -> None:
        if self.kueue is not None and self.volcano is not None:
            raise ValueError("--kueue and --volcano are two queues, and a job waits in one; leave one of them out")
        if self.kueue is not None and self.elastic is not None:
            raise ValueError(
                "--elastic-rollout: Kueue admits a job whole and takes none that scales by itself; leave it out, or "
                "--kueue"
            )
        if not self.mount.startswith("/"):
            raise ValueError(f"--mount: {self.mount} is not a path in the pods; write an absolute one such as /runs")


def parse_kind(text: str) -> Kind:
    """One of the two that can be rendered."""
    match text:
        case "job" | "cluster":
            return text
    raise ValueError(f"--kind: there is no {text!r}; write job or cluster")


def parse_elastic(text: str | None) -> Elastic | None:
    """`2..8` as two numbers."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if found is None or int(found[1]) > int(found[2]) or int(found[2]) == 0:
        raise ValueError(f"--elastic-rollout: {text!r} is no range; write MIN..MAX such as 2..8")
    return Elastic(int(found[1]), int(found[2]))


def parse_secret_env(texts: Sequence[str]) -> tuple[SecretEnv, ...]:
    """Each `NAME=SECRET:KEY`; never a value."""
    found = [re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)=([a-z0-9][-a-z0-9.]*):([-._a-zA-Z0-9]+)", text) for text in texts]
    if None in found:
        name = texts[found.index(None)].partition("=")[0]  # what stands behind it may be a value: it is not repeated
        raise ValueError(
            f"--secret-env {name}: write NAME=SECRET:KEY, such as WANDB_API_KEY=wandb:key; the value itself stays in "
            "the cluster (kubectl create secret generic SECRET --from-literal=KEY=...)"
        )
    return tuple(SecretEnv(match[1], match[2], match[3]) for match in found if match is not None)


def parse_labels(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Each `KEY=VALUE` of a node."""
    for text in texts:
        if not re.fullmatch(r"[-._/a-zA-Z0-9]+=[-._a-zA-Z0-9]*", text):
            raise ValueError(f"--node-selector: {text!r} is no label of a node; write KEY=VALUE")
    pairs = (text.partition("=") for text in texts)
    return tuple((key, value) for key, _, value in pairs)
