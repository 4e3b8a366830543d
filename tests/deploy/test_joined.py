"""A cluster that cannot be joined, or cannot hold the run, is told with the fix and exit code 2; nothing begins."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.recipe.file import load_recipe
from actors.recipe.pools import first_pools
from deploy.joined import may_hold, opened
from deploy.nodes import probe_file, unseen
from placement.cluster import ClusterSpec, NodeSpec
from tests.chaos.test_left_behind import held
from tests.chaos.test_node_loss import Machines
from tests.deploy.test_job_submit import ROOT

RECIPE = """
kind: grpo
name: case
steps: 1
groups_per_batch: 2
model: {{kind: pretrained, path: {folder}/model}}
reference: {{kind: pretrained, path: hub/teacher}}
dataset: {{path: {folder}/rows.jsonl}}
rewards: {{functions: [{{function: "{folder}/reward.py:f"}}, {{function: "reward.py:f"}}, {{model: {folder}/model}}]}}
algorithm: {{num_generations: 2, beta: 0.1}}
pools: {{policy: {{gpus_per_worker: 1}}, reward: {{node_resource: scorers}}}}
run_dir: {folder}/run
"""


def test_what_workers_open_is_known_by_pool(tmp_path: Path) -> None:
    for name in ("model/config.json", "reward.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    found = set(opened(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "probe"))
    model = tmp_path / "model"
    assert found == {
        ("policy", "run_dir", tmp_path / "probe"),
        ("critic", "run_dir", tmp_path / "probe"),
        ("policy", "model.path", model),
        ("rollout", "model.path", model),
        ("critic", "model.path", model),
        ("reward", "rewards.functions.0.function", tmp_path / "reward.py"),
        ("reward", "rewards.functions.2.model", model),
    }, "the teacher is the hub's, a relative file travels, rows are read where the command is given"
    tiny = load_recipe("recipes/demo.yaml", ["model={kind: tiny}"])
    assert ("rollout", "run_dir", tmp_path / "probe") in set(opened(tiny, tmp_path / "probe"))


def test_nodes_that_may_hold_a_worker_are_those_that_could_alone(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    pools = first_pools(load_recipe(tmp_path / "recipe.yaml"))
    cluster = ClusterSpec((NodeSpec("a", 8.0, 0, {"scorers": 1.0}), NodeSpec("b", 8.0, 1), NodeSpec("c", 0.0, 0)))
    found = {pool: list(may_hold(config, cluster)) for pool, config in pools.items()}
    assert found == {"policy": ["b"], "reference": ["a", "b"], "reward": ["a"], "rollout": ["a", "b"]}


def test_a_probe_is_there_for_others_to_see_and_then_gone(tmp_path: Path) -> None:
    with probe_file(tmp_path / "runs") as probe:
        assert unseen([str(probe), str(tmp_path / "other")]) == [str(tmp_path / "other")]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """A head with a token."""
    machines = Machines(tmp_path_factory.mktemp("cluster") / "ray.log")
    machines.head()
    yield machines
    machines.close()


TINY = ("recipes/offline/kto.yaml", "steps=1", "policy.num_threads=1")


def refused(machines: Machines, verb: str, *words: str, **env: str) -> str:
    """What the command says that ends with 2."""
    command = [sys.executable, "-m", "deploy", verb, *words, "--address", machines.address]
    environment = machines.env | env
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


@pytest.mark.cluster
def test_a_cluster_that_does_not_let_us_in_or_is_too_small_is_told(machines: Machines, tmp_path: Path) -> None:
    run = f"run_dir={tmp_path}/run"
    says = refused(machines, "train", *TINY, run, RAY_AUTH_TOKEN="f" * 64)
    assert "has another token than the one that is set here; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in says
    says = refused(machines, "plan", "recipes/demo.yaml", RAY_AUTH_TOKEN="", RAY_AUTH_MODE="disabled")
    assert "asks for a token, and none is set here; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in says
    says = refused(machines, "train", *TINY, run, "pools.policy.cpus_per_worker=3")
    assert "kto: the cluster is too small: pool 'policy' needs 1 worker x 3 CPUs" in says
    assert list(tmp_path.iterdir()) == []
    assert held(machines) == []


@pytest.mark.cluster
def test_a_run_folder_that_another_node_does_not_see_is_told(machines: Machines, tmp_path: Path) -> None:
    """A node in a mount namespace of its own has another folder under the same name."""
    blind = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(tmp_path)]
    if subprocess.run([*blind, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a mount namespace is not to be had")
    machines.start(f"--address={machines.address}", "--num-cpus=1", within=blind)
    says = refused(machines, "train", *TINY, f"run_dir={tmp_path}/run", "pools.policy.cpus_per_worker=1")
    assert f"run_dir: what is written in {tmp_path}/run here is not seen on " in says
    assert "choose a folder on storage that all nodes mount at the same place" in says
    assert list(tmp_path.iterdir()) == []
    assert held(machines) == []
