"""`python -m deploy` as a user meets it: exit code 0 with what was asked for, or 2 with one message."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from actors.recipe.file import load_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the recipes that ship, and no runs."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def deploy(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command line."""
    command = [sys.executable, "-m", "deploy", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stdout + done.stderr
    return done.returncode, done.stdout, done.stderr


def test_a_plan_shows_pools_figures_and_the_submit_line(tmp_path: Path) -> None:
    first = tmp_path / "first.yaml"
    first.write_text(Path("recipes/demo_sft.yaml").read_text() + f"run_dir: {tmp_path}/run\n")
    overrides = [
        *("pools.rollout.num_workers=2", "pools.rollout.gpus_per_worker=4", "dataset.split=a b"),
        *("steps=7", f"model.recipe={first}"),
    ]
    code, out, err = deploy("plan", "recipes/demo.yaml", *overrides, "--nodes", "2", "--gpus-per-node", "8")
    assert (code, err) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert [row for row in rows if row[0] == "rollout"] == [
        ["rollout", "0", "node-0", "1", "4"],
        ["rollout", "1", "node-0", "1", "4"],
    ]
    assert [row[0] for row in rows] == ["policy", "reward", "rollout", "rollout"]
    assert "cluster: 2 x (32 CPUs, 8 GPUs)" in out
    assert (
        "7 steps of 128 rollouts (16 groups x 8); staleness at most 2 versions (pace), 24 groups in flight at most"
        in out
    )
    assert "weights: gloo, to 8 rollout workers by one broadcast group, all on one machine" in out
    assert "stall: when no group has finished for 1036 s while the policy waits (stall.timeout_s: 600 generation" in out
    assert f"{first}, which is trained first: sft, {load_recipe(first).steps} steps of 64 sequences" in out
    assert (
        "python -m deploy submit recipes/demo.yaml pools.rollout.num_workers=2 "
        f"pools.rollout.gpus_per_worker=4 'dataset.split=a b' steps=7 model.recipe={first} --address http://HEAD:8265\n"
    ) in out


def test_a_plan_for_nodes_with_labels_shows_what_binds_a_pool() -> None:
    bound = ("pools.policy.node_labels={tier: train}", "pools.rollout.node_labels={tier: serve}")
    nodes = ("1:tier=serve", "2:tier=train,rack=7", "dc=x")
    given = [word for labels in nodes for word in ("--node-labels", labels)]
    code, out, err = deploy("plan", "recipes/demo.yaml", "model={kind: tiny}", *bound, "--nodes", "3", *given)
    assert (code, err) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert [(row[0], row[2], row[5]) for row in rows] == [
        ("policy", "node-1", "tier=train"),
        ("reward", "node-0", ""),
        ("rollout", "node-0", "tier=serve"),
    ]
    assert "cluster: 1 x (32 CPUs, 0 GPUs, tier=serve), 2 x (32 CPUs, 0 GPUs, tier=train)\n" in out
    assert "only on nodes with" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["plan", "recipes/demo.yaml", "staleness.max_stalenes=1", "steps=x"],
            "error: override 'steps=x': steps: 'x' is not an integer; write a whole number such as 8\n"
            "       override 'staleness.max_stalenes=1': staleness.max_stalenes: unknown key; "
            "did you mean 'max_staleness'?\n",
        ),
        (["plan", "recipes/none.yaml"], "error: recipes/none.yaml: no such file; recipes in recipes: demo.yaml"),
        (["train", "recipes/none.yaml"], "error: recipes/none.yaml: no such file"),
        (
            ["plan", "recipes/demo.yaml", "pools.rollout.gpus_per_worker=1", "--nodes", "3"],
            "error: pool 'rollout' needs 1 worker x 1 GPU; no worker fits; 1 GPU is missing: add a node",
        ),
        (
            ["plan", "recipes/demo.yaml", "--nodes", "1", "--cpus-per-node", "1.75"],
            "error: recipes/demo_sft.yaml, which is trained first: pool 'policy' needs 1 worker",
        ),
        (
            ["plan", "recipes/demo.yaml", "--address", "127.0.0.1:9"],
            "error: --address 127.0.0.1:9: ",  # what the system calls a closed port
        ),
        (["plan", "recipes/demo.yaml", "--cpus-per-node", "4"], "error: --cpus-per-node, --gpus-per-node and --node-"),
        (["plan", "recipes/demo.yaml", "--node-labels", "a=b"], "error: --cpus-per-node, --gpus-per-node and --node-"),
        (
            ["plan", "recipes/demo.yaml", "--nodes", "2", "--node-labels", "train"],
            "error: --node-labels train: write KEY=VALUE, or COUNT:KEY=VALUE for so many nodes, such as 2:tier=train",
        ),
        (
            ["plan", "recipes/demo.yaml", "--nodes", "2", "--node-labels", "3:tier=train"],
            "error: --node-labels: 3 nodes are given labels, and --nodes says 2",
        ),
        (
            ["plan", "recipes/demo.yaml", "pools.reward.node_labels={tier: cheap}", "--nodes", "2"],
            "error: pool 'reward' needs nodes with the label tier=cheap, and no node has it: start Ray on them with "
            "--labels=tier=cheap, or remove pools.reward.node_labels",
        ),
        (
            ["plan", "recipes/demo.yaml", "pools.reward.node_labels={tier: '!cheap'}"],
            "error: override \"pools.reward.node_labels={tier: '!cheap'}\": pools.reward.node_labels: label tier: "
            "'!cheap' is none that Ray takes; write letters and digits",
        ),
        (
            ["plan", "recipes/demo.yaml", "pools.reward.node_labels={rack: 5}"],
            "error: override 'pools.reward.node_labels={rack: 5}': pools.reward.node_labels: label rack: 5 is not "
            "text; write it in quotes",
        ),
        (
            ["plan", "recipes/demo.yaml", "model.recipe=recipes/demo.yaml", "--nodes", "1"],
            "error: recipes/demo.yaml: model.recipe: recipes/demo.yaml would be trained before itself",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_user_errors_are_one_message_and_exit_code_2(arguments: list[str], message: str) -> None:
    code, out, err = deploy(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message)


def test_a_model_that_is_there_is_not_planned_for(house: Path) -> None:
    (house / "runs/demo-sft").mkdir(parents=True)
    (house / "runs/demo-sft/summary.json").write_text("{}")
    code, out, err = deploy("plan", "recipes/demo.yaml", "--nodes", "1", "--cpus-per-node", "1.75")
    assert (code, err, "demo_sft" in out) == (0, "", False)


@pytest.mark.cluster
def test_a_live_cluster_is_planned_for_as_it_is() -> None:
    context = ray.init("local", num_cpus=3, num_gpus=5, include_dashboard=False, log_to_driver=False)
    try:
        address = context.address_info["gcs_address"]
        code, out, _ = deploy("plan", "recipes/demo.yaml", "pools.rollout.gpus_per_worker=5", "--address", address)
        assert (code, "cluster: 1 x (3 CPUs, 5 GPUs)" in out) == (0, True)
        code, _, err = deploy("plan", "recipes/demo.yaml", "pools.rollout.gpus_per_worker=6", "--address", address)
        assert (code, "pool 'rollout' needs 1 worker x 6 GPUs" in err) == (2, True)
    finally:
        ray.shutdown()


def test_a_plan_says_how_weights_travel(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {}, "w": {"dtype": "F32", "shape": [1024, 2**20], "data_offsets": [0, 0]}})
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    recipe = ("plan", "recipes/demo.yaml", "pools.rollout.num_workers=8")
    recipe += ("pools.rollout.gpus_per_worker=1", "pools.policy.gpus_per_worker=1")
    cluster = ("--nodes", "9", "--gpus-per-node", "1")
    code, out, _ = deploy(*recipe, f"model={{kind: pretrained, path: {tmp_path}}}", *cluster)
    assert code == 0
    expected = r"to 8 rollout workers by a chain; predicted 1\.3\d times what a link takes for one copy \(one group: 4"
    assert re.search(expected, out)
    code, out, _ = deploy(*recipe, "sync.fanout=3", *cluster)
    assert code == 0
    assert "by a relay tree of fan-out 3; predicted " in out
    assert "the model is not here yet and counts as one bucket\n" in out


def test_without_arguments_the_help_is_shown() -> None:
    _, out, err = deploy()
    assert all(verb in out + err for verb in ("train", "plan", "tiny-model"))


def test_planning_loads_neither_ray_nor_torch_nor_vllm() -> None:
    script = (
        "import sys; from deploy.__main__ import app; "
        "app(['plan', 'recipes/demo.yaml', '--nodes', '1'], standalone_mode=False); "
        "print('loaded:', *{'ray', 'torch', 'vllm', 'deepspeed', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.endswith("loaded:\n")
