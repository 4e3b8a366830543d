"""Every recipe that ships becomes a manifest on which its plan fits; what cannot run is one message and exit code 2."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from actors.recipe.file import load_recipe
from actors.recipe.pools import used_pools
from deploy.__main__ import app
from deploy.manifest.options import Elastic, ManifestOptions, SecretEnv
from deploy.manifest.render import manifest_text, render
from deploy.manifest.rules import broken_rules
from placement.cluster import ClusterSpec, NodeSpec
from placement.plan import plan

ROOT = Path(__file__).parents[3]
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("recipes/**/*.yaml"))
DEMO = "recipes/demo.yaml"
LORA = "recipes/qwen2.5_7b_lora.yaml"
REFERENCE = "{kind: pretrained, path: Qwen/Qwen2.5-7B-Instruct}"
"""One that is named has workers, also where the policy trains adapters."""


@pytest.fixture(autouse=True)
def _house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with the recipes that ship, and no runs."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def rendered(path: str = LORA, *overrides: str, **options: Any) -> dict[str, Any]:
    return render(
        load_recipe(path, overrides), path, overrides, ManifestOptions(image="registry/paceline:1", **options), "2.60.0"
    )


def groups(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    cluster = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    return {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def ray_nodes(manifest: dict[str, Any]) -> ClusterSpec:
    """The nodes that Ray would see, read from the manifest alone."""
    nodes = []
    for name, group in groups(manifest).items():
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        custom = {resource: float(amount) for resource, amount in group["resources"].items()}
        for index in range(group["replicas"]):
            gpus = int(limits.get("nvidia.com/gpu", 0))
            nodes.append(NodeSpec(f"{name}-{index}", float(limits["cpu"]), gpus, custom, group.get("labels", {})))
    return ClusterSpec(tuple(nodes))


@pytest.mark.parametrize("kind", ["job", "cluster"])
@pytest.mark.parametrize("path", RECIPES)
def test_every_recipe_has_a_manifest_that_breaks_no_rule(path: str, kind: Any) -> None:
    assert broken_rules(rendered(path, kind=kind)) == []


@pytest.mark.parametrize("path", RECIPES)
def test_the_run_that_the_entrypoint_starts_fits_on_the_pods(path: str) -> None:
    manifest = rendered(path)
    python, dash_m, package, verb, recipe_path, *overrides = shlex.split(manifest["spec"]["entrypoint"])
    assert (python, dash_m, package, verb, recipe_path) == ("python", "-m", "deploy", "train", path)
    recipe = load_recipe(recipe_path, overrides)
    homes = {pool: config.colocate_with or pool for pool, config in used_pools(recipe).items()}
    assert set(groups(manifest)) == {*homes.values()}
    placed = plan(used_pools(recipe), ray_nodes(manifest))
    for pool, bundles in placed.bundles.items():
        assert {bundle.node.rpartition("-")[0] for bundle in bundles} == {homes[pool]}


@pytest.mark.parametrize(
    ("overrides", "options", "expected"),
    [
        ((), {}, {"policy": (1, 4, 4), "reward": (1, 1, 0), "rollout": (1, 4, 4)}),
        ((), {"gpus_per_node": 2}, {"policy": (2, 2, 2), "reward": (1, 1, 0), "rollout": (2, 2, 2)}),
        (
            ("algorithm.beta=0.01", "pools.reference.gpus_per_worker=1", f"reference={REFERENCE}"),
            {},
            {"policy": (1, 4, 4), "reference": (1, 1, 1), "reward": (1, 1, 0), "rollout": (1, 4, 4)},
        ),
        (
            ("pools.rollout.gpus_per_worker=4", "pools.policy.num_workers=12"),
            {},
            {"policy": (2, 6, 6), "reward": (1, 1, 0), "rollout": (2, 2, 8)},
        ),
        (
            ("pools.rollout.colocate_with=policy", "pools.rollout.cpus_per_worker=2"),
            {"gpus_per_node": 2},
            {"policy": (2, 6, 2), "reward": (1, 1, 0)},
        ),
        (
            ("pools.rollout={num_workers: 3, gpus_per_worker: 2, colocate_with: policy}", "pools.policy.num_workers=6"),
            {"gpus_per_node": 3},
            {"policy": (3, 3, 2), "reward": (1, 1, 0)},
        ),
        (
            ("pools.rollout.strategy=spread", "pools.reward.num_workers=40", "pools.reward.cpus_per_worker=2"),
            {},
            {"policy": (1, 4, 4), "reward": (3, 28, 0), "rollout": (4, 1, 1)},
        ),
    ],
)
def test_pools_become_as_few_equal_pods_as_hold_them(
    overrides: tuple[str, ...], options: dict[str, Any], expected: dict[str, tuple[int, int, int]]
) -> None:
    found = {}
    for pool, group in groups(rendered(LORA, *overrides, **options)).items():
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        found[pool] = (group["replicas"], int(limits["cpu"]), int(limits.get("nvidia.com/gpu", 0)))
    assert found == expected


def test_pods_hold_what_is_trained_first_too() -> None:
    limits = groups(rendered(DEMO))["policy"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["cpu"] == "2"  # the warm-up's; the demo's own policy takes half a core


def test_a_pool_that_the_recipe_binds_keeps_its_resource() -> None:
    manifest = rendered(LORA, "pools.policy.node_resource=h100")
    assert groups(manifest)["policy"]["resources"] == {"h100": "1"}
    assert "node_resource=paceline-policy" not in manifest["spec"]["entrypoint"]
    assert "pools.rollout.node_resource=paceline-rollout" in manifest["spec"]["entrypoint"]


def test_labels_that_the_recipe_asks_for_are_given_to_the_pods_of_the_pool() -> None:
    bound = "pools.policy.node_labels={tier: train, ray.io/accelerator-type: H100}"
    manifest = rendered(LORA, bound)
    assert groups(manifest)["policy"]["labels"] == {"tier": "train"}, "Ray's own are found out by Ray"
    assert not [name for name, group in groups(manifest).items() if "labels" in group and name != "policy"]
    assert broken_rules(manifest) == []
    simple = rendered(LORA, "pools.policy.node_labels={tier: train}")
    recipe = load_recipe(LORA, shlex.split(simple["spec"]["entrypoint"])[5:])
    assert recipe.pools.policy.node_labels == {"tier": "train"}
    assert {bundle.node for bundle in plan(used_pools(recipe), ray_nodes(simple)).bundles["policy"]} == {"policy-0"}


def test_the_head_works_for_nobody_and_stops_the_run_before_it_ends() -> None:
    head = rendered(checkpoint_grace_s=900)["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    container = head["template"]["spec"]["containers"][0]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    assert container["lifecycle"]["preStop"]["exec"]["command"][1:] == ["-m", "deploy.drain", "--within-s", "870"]
    assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "870"} in container["env"]
    assert head["template"]["spec"]["terminationGracePeriodSeconds"] == 900


def test_secrets_are_named_and_never_written() -> None:
    manifest = rendered(token_secret="ray-token", secret_env=(SecretEnv("WANDB_API_KEY", "wandb", "key"),))
    cluster = manifest["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        env = {entry["name"]: entry for entry in group["template"]["spec"]["containers"][0]["env"]}
        assert env["WANDB_API_KEY"]["valueFrom"] == {"secretKeyRef": {"name": "wandb", "key": "key"}}
    assert yaml.safe_load(manifest["spec"]["runtimeEnvYAML"]) == {"env_vars": {"PYTHONPATH": "/app"}}


def test_queues_are_labels() -> None:
    job = rendered(kueue="team")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert job["spec"]["suspend"] is True
    cluster = rendered(kind="cluster", volcano="team")
    assert cluster["metadata"]["labels"]["volcano.sh/queue-name"] == "team"
    assert cluster["metadata"]["labels"]["ray.io/scheduler-name"] == "volcano"
    assert "suspend" not in cluster["spec"]
    assert broken_rules(job) == broken_rules(cluster) == []


def test_an_elastic_rollout_group_has_a_replica_in_each_pod() -> None:
    manifest = rendered(elastic=Elastic(2, 8))
    cluster, rollout = manifest["spec"]["rayClusterSpec"], groups(manifest)["rollout"]
    assert (rollout["minReplicas"], rollout["replicas"], rollout["maxReplicas"]) == (2, 4, 8)
    assert (cluster["enableInTreeAutoscaling"], cluster["autoscalerOptions"]["version"]) == (True, "v2")
    assert groups(manifest)["policy"]["minReplicas"] == groups(manifest)["policy"]["maxReplicas"] == 1
    assert broken_rules(manifest) == []


def test_a_recipe_whose_replicas_come_and_go_says_the_range_itself() -> None:
    manifest = rendered(LORA, "pools.rollout.min_workers=2", "pools.rollout.max_workers=8")
    assert groups(manifest)["rollout"] == groups(rendered(elastic=Elastic(2, 8)))["rollout"]
    assert manifest["spec"]["rayClusterSpec"]["autoscalerOptions"]["version"] == "v2"
    assert broken_rules(manifest) == []
    fixed = groups(rendered())["rollout"]
    assert fixed["minReplicas"] == fixed["maxReplicas"]


def test_the_text_is_the_manifest() -> None:
    options = ManifestOptions(image="registry/paceline:1")
    text = manifest_text(load_recipe(LORA), LORA, (), options, "2.60.0")
    assert yaml.safe_load(text) == render(load_recipe(LORA), LORA, (), options, "2.60.0")
    cluster = manifest_text(load_recipe(LORA), LORA, (), ManifestOptions(image="i", kind="cluster"), "2.60.0")
    assert "python -m deploy submit recipes/qwen2.5_7b_lora.yaml pools.policy.node_resource=paceline-policy" in cluster
    assert "run_dir=/app/runs/qwen2-5-7b-lora --address http://127.0.0.1:8265\n" in cluster
    demo = manifest_text(load_recipe(DEMO), DEMO, (), ManifestOptions(image="i", kind="cluster"), "2.60.0")
    assert "# first write run_dir: /app/runs/demo-sft into recipes/demo_sft.yaml, which is trained before\n" in demo


def deploy(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["manifest", *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def test_the_verb_writes_yaml_and_nothing_else() -> None:
    arguments = ("--image", "registry/paceline:1", "--elastic-rollout", "2..6", "--secret-env", "HF_TOKEN=hub:token")
    command = [sys.executable, "-m", "deploy", "manifest", LORA, "steps=7", "--name", "first", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    manifest = yaml.safe_load(done.stdout)
    assert manifest["metadata"]["name"] == "first"
    assert shlex.split(manifest["spec"]["entrypoint"])[5] == "steps=7"


TOO_LONG = "x" * 48


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["name=7b"], "error: name: 7b is no name in Kubernetes, which begins with a letter"),
        (["--name", "Mine_1"], "error: --name Mine_1 is no name in Kubernetes"),
        (
            ["--name", TOO_LONG],
            f"error: --name {TOO_LONG} has 48 characters, and KubeRay takes 47",
        ),
        (
            ["run_dir=/tmp/x"],
            f"error: {LORA}: run_dir: /tmp/x is not on the volume of claim 'paceline-runs', which the pods see at "
            "/app/runs, so the run would be lost with them; set run_dir=/app/runs/qwen2-5-7b-lora",
        ),
        (["run_dir=runs/../x"], f"error: {LORA}: run_dir: /app/runs/../x is not on the volume"),
        (["--mount", "/data"], f"error: {LORA}: run_dir: /app/runs/qwen2-5-7b-lora is not on the volume"),
        (["model.path=/models/q"], "error: model.path: the pods do not see /models/q; copy it to the volume"),
        (["dataset.path=../x.jsonl"], "error: dataset.path: ../x.jsonl leads out of the project"),
        (
            ["rewards.functions.0.function=/home/me/mine.py:score"],
            "error: rewards.functions.0.function: the pods do not see /home/me/mine.py; copy it to the volume",
        ),
        (["dataset.path=data/train.jsonl"], "error: dataset.path: data/train.jsonl is not in the image, which holds"),
        (["model.path=./q"], "error: model.path: ./q is not in the image"),
        (["model.path=models/mine/q"], "error: model.path: models/mine/q is not in the image"),
        (
            ["rewards.functions.0.function=mine.py:score"],
            "error: rewards.functions.0.function: mine.py is not in the image, which holds actors, algorithms, deploy, "
            "placement, recipes, sync of this checkout; put it below recipes/ before the image is built, or on the "
            "volume of claim 'paceline-runs' and write /app/runs/mine.py (an image of your own may hold it: write "
            "/app/mine.py)",
        ),
        (["--kueue", "a", "--volcano", "b"], "error: --kueue and --volcano are two queues"),
        (["--kueue", "a", "--elastic-rollout", "1..8"], "error: --elastic-rollout: Kueue admits a job whole"),
        (
            ["--elastic-rollout", "5..8"],
            "error: --elastic-rollout 5..8: the run begins with pools.rollout.num",
        ),
        (
            ["pools.rollout.max_workers=6", "--elastic-rollout", "2..8"],
            "error: --elastic-rollout: the recipe says 4..6",
        ),
        (["pools.rollout.max_workers=6", "--kueue", "a"], "error: --kueue: Kueue admits a job whole"),
        (
            ["pools.rollout.colocate_with=policy", "--elastic-rollout", "1..8"],
            "error: --elastic-rollout: the replicas lie on the policy's GPUs",
        ),
        (["--elastic-rollout", "8..5"], "error: --elastic-rollout: '8..5' is no range"),
        (["--kind", "service"], "error: --kind: there is no 'service'"),
        (["--node-selector", "gpu"], "error: --node-selector: 'gpu' is no label"),
        (["pools.rollout.gpus_per_worker=16"], "error: pools.rollout.gpus_per_worker: 16, but a node has 8 GPUs"),
        (["pools.policy.cpus_per_worker=33"], "error: pools.policy.cpus_per_worker: 33, but a node has 32 CPUs"),
        (["pools.policy.node_resource=big-gpu"], "error: KubeRay would refuse this manifest:"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_run_is_one_message_and_exit_code_2(arguments: list[str], message: str) -> None:
    code, out, err = deploy(LORA, "--image", "i", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message)


def test_a_secret_s_value_is_not_repeated() -> None:
    code, out, err = deploy(LORA, "--image", "i", "--secret-env", "HF_TOKEN=hf_very_secret_value")
    assert code == 2
    assert "very_secret" not in out + err


def test_a_run_that_samples_nothing_has_no_replicas_to_come_and_go() -> None:
    with pytest.raises(ValueError, match="--elastic-rollout: a recipe of kind 'dpo' has no rollout replicas; leave it"):
        rendered("recipes/offline/dpo.yaml", elastic=Elastic(1, 2))


def test_the_suggested_names_will_do() -> None:
    for given in ("7b", "Mine_1", TOO_LONG, "9-9-", "___"):
        _, _, err = deploy(LORA, "--image", "i", "--name", given)
        suggested = err.split("--name ")[-1].strip()
        assert deploy(LORA, "--image", "i", "--name", suggested)[0] == 0, (given, suggested)


def test_a_manifest_is_data_alone() -> None:
    manifest = rendered(secret_env=(SecretEnv("A", "b", "c"),), node_selector=(("gpu", "h100"),))
    assert json.loads(json.dumps(manifest)) == manifest
    assert groups(manifest)["policy"]["template"]["spec"]["nodeSelector"] == {"gpu": "h100"}
    assert "nodeSelector" not in groups(manifest)["reward"]["template"]["spec"]


@pytest.mark.parametrize(
    "override",
    [
        "dataset.path=runs/data/train.jsonl",
        "dataset.path=recipes/train.jsonl",
        "dataset.path=/app/data/train.jsonl",
        "dataset.path=openai/gsm8k",
        "model.path=Qwen/Qwen2.5-7B-Instruct",
        "model.path=gpt2",
        "rewards.functions.0.function=/app/runs/mine.py:score",
    ],
)
def test_what_the_pods_see_or_fetch_from_the_hub_is_taken(override: str) -> None:
    rendered(LORA, override)


def test_a_model_that_is_here_is_no_name_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "Qwen" / "mine").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"model\.path: Qwen/mine is not in the image"):
        rendered(LORA, "model.path=Qwen/mine")


def test_a_recipe_that_is_not_in_the_image_is_refused(tmp_path: Path) -> None:
    shutil.copy(LORA, tmp_path / "mine.yaml")
    with pytest.raises(ValueError, match=r"the recipe's path: mine\.yaml is not in the image"):
        rendered("mine.yaml")
