"""A cluster that cannot be joined, or cannot hold the run, is told with the fix and exit code 2; nothing begins."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
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
from tests.prove import ONLY_PROVE

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
    found = {pool: list(may_hold(pools, pool, cluster)) for pool in pools}
    assert found == {"policy": ["b"], "reference": ["a", "b"], "reward": ["a"], "rollout": ["a", "b"]}


def test_guests_are_where_the_policy_is(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    guests = ["pools.rollout={colocate_with: policy, gpus_per_worker: 1}", "rollout.dtype=bfloat16"]
    pools = first_pools(load_recipe(tmp_path / "recipe.yaml", guests))
    cluster = ClusterSpec((NodeSpec("a", 8.0, 0, {"scorers": 1.0}), NodeSpec("b", 8.0, 1)))
    assert list(may_hold(pools, "rollout", cluster)) == ["b"]
    assert list(may_hold(pools, "critic", cluster)) == [], "the recipe has none"


def test_a_probe_is_there_for_others_to_see_and_then_gone(tmp_path: Path) -> None:
    with probe_file(tmp_path / "runs") as probe:
        assert unseen([str(probe), str(tmp_path / "other")]) == [str(tmp_path / "other")]
    assert list(tmp_path.iterdir()) == []


TINY = ("recipes/offline/kto.yaml", "steps=1", "policy.num_threads=1")
BLIND = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"']
"""A command in a mount namespace of its own has another folder under the same name."""


@dataclass(frozen=True)
class Told:
    """What each command said, and ended with."""

    folder: Path
    said: dict[str, tuple[int, str]]
    left: list[str]
    """What is reserved on the cluster after them."""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """Several commands at once on a cluster with a token, of which one node sees another folder, where that can be."""
    folder, machines = tmp_path_factory.mktemp("runs"), Machines(tmp_path_factory.mktemp("cluster") / "ray.log")
    run = f"run_dir={folder}/run"
    stranger, nobody = {"RAY_AUTH_TOKEN": "f" * 64}, {"RAY_AUTH_TOKEN": "", "RAY_AUTH_MODE": "disabled"}
    commands: dict[str, tuple[list[str], dict[str, str]]] = {
        "another token": (["train", *TINY, run], stranger),
        "no token": (["plan", "recipes/demo.yaml"], nobody),
        "too small": (["train", *TINY, run, "pools.policy.cpus_per_worker=3"], {}),
    }
    begun: dict[str, subprocess.Popen[str]] = {}
    try:
        machines.head()
        if subprocess.run([*BLIND, str(folder), "true"], capture_output=True, check=False).returncode == 0:
            machines.start(f"--address={machines.address}", "--num-cpus=1", within=[*BLIND, str(folder)])
            commands["blind"] = (["train", *TINY, run], {})
        begun |= {name: _begin(machines, words, env) for name, (words, env) in commands.items()}
        outputs = {name: process.communicate(timeout=200)[1] for name, process in begun.items()}
        said = {name: (begun[name].returncode, text) for name, text in outputs.items()}
        yield Told(folder, said, held(machines))
    finally:
        for process in begun.values():
            process.kill()
        machines.close()


def _begin(machines: Machines, words: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "deploy", *words, "--address", machines.address]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=machines.env | env, stdout=pipe, stderr=pipe, text=True)


TOKEN = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE as on its nodes"
SAYS = {
    "another token": f"has another token than the one that is set here; {TOKEN}",
    "no token": f"asks for a token, and none is set here; {TOKEN}",
    "too small": "kto: the cluster is too small: pool 'policy' needs 1 worker x 3 CPUs",
    "blind": "/run here is not seen on ",
}


@ONLY_PROVE
@pytest.mark.cluster
@pytest.mark.parametrize("case", SAYS)
def test_a_cluster_that_cannot_have_the_run_is_told_with_the_fix(told: Told, case: str) -> None:
    if case not in told.said:
        pytest.skip("a mount namespace is not to be had")
    code, errors = told.said[case]
    assert code == 2, errors
    assert "Traceback" not in errors
    assert sum(line.startswith("error: ") for line in errors.splitlines()) == 1, errors
    assert SAYS[case] in errors
    assert list(told.folder.iterdir()) == []
    assert told.left == []
