"""What is rendered is what KubeRay's own schema takes; set PACELINE_KUBERAY_CRDS to the folder of its CRDs to see it.

The folder holds `ray.io_rayjobs.yaml` and `ray.io_rayclusters.yaml` (`helm-chart/kuberay-operator/crds` of KubeRay).
"""

import functools
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from actors.recipe.file import load_recipe
from deploy.manifest.options import Elastic, ManifestOptions, SecretEnv
from deploy.manifest.render import render

ROOT = Path(__file__).parents[3]
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("recipes/**/*.yaml"))
CRDS = os.environ.get("PACELINE_KUBERAY_CRDS")

pytestmark = pytest.mark.skipif(
    CRDS is None or not Path(CRDS).is_dir(), reason="PACELINE_KUBERAY_CRDS names no folder with KubeRay's CRDs"
)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cluster": {"kind": "cluster"},
    "kueue": {"kueue": "queue"},
    "volcano": {"volcano": "queue", "submission": "SidecarMode", "namespace": "team"},
    "secrets": {
        "token_secret": "token",
        "secret_env": (SecretEnv("A", "b", "c"),),
        "node_selector": (("gpu", "h100"),),
        "kind": "cluster",
    },
}


@functools.cache
def schema(kind: str) -> dict[str, Any]:
    """The schema of v1 with every object closed: the cluster would drop what it does not know, and say nothing."""
    text = (Path(str(CRDS)) / f"ray.io_{kind.lower()}s.yaml").read_text()
    versions = yaml.load(text, Loader=yaml.CSafeLoader)["spec"]["versions"]
    (found,) = (version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    return _closed(found)


def _closed(node: Any) -> Any:
    if isinstance(node, list):
        return [_closed(entry) for entry in node]
    if not isinstance(node, dict):
        return node
    closed = {key: _closed(value) for key, value in node.items()}
    is_open = closed.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in closed
    if closed.get("type") == "object" and "properties" in closed and not is_open:
        closed["additionalProperties"] = False
    return closed


def problems(manifest: dict[str, Any]) -> list[str]:
    validator = jsonschema.Draft202012Validator(schema(manifest["kind"]))
    return [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(manifest)]


def rendered(path: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    monkeypatch.chdir(ROOT)
    return render(load_recipe(path), path, (), ManifestOptions(image="i", **options), "2.60.0")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("path", RECIPES)
def test_every_recipe_renders_to_what_the_schema_takes(
    path: str, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert problems(rendered(path, monkeypatch, **OPTIONS[options])) == []


def test_an_elastic_cluster_is_what_the_schema_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems(rendered("recipes/qwen2.5_7b_lora.yaml", monkeypatch, elastic=Elastic(1, 9))) == []


def test_labels_of_a_pool_are_what_the_schema_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path, bound = "recipes/demo.yaml", ["pools.policy.node_labels={tier: train}"]
    manifest = render(load_recipe(path, bound), path, bound, ManifestOptions("i"), "2.60.0")
    assert {"tier": "train"} in [g.get("labels") for g in manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
    assert problems(manifest) == []


def test_the_schema_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = rendered("recipes/demo.yaml", monkeypatch)
    cluster = manifest["spec"]["rayClusterSpec"]
    del cluster["workerGroupSpecs"][0]["minReplicas"]
    cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    cluster["authOptions"]["mode"] = "password"
    manifest["spec"]["backoffLimit"] = "1"
    found = "\n".join(problems(manifest))
    assert all(word in found for word in ("minReplicas", "imagePolicy", "password", "backoffLimit"))
