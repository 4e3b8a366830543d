"""`python -m deploy doctor` as a user meets it: a line for each check, and an exit code that tells if one failed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.doctor.check import failed, warned
from deploy.doctor.report import line
from tests.chaos.test_left_behind import machines
from tests.chaos.test_node_loss import Machines
from tests.prove import ONLY_PROVE

__all__ = ["machines"]

LINE = re.compile(r"(pass|warn|fail|skip)  (\S.*?)  +\S.*")


def levels_of(out: list[str]) -> dict[str, str]:
    """What each check has found, by its name; every line but the last is one."""
    matches = [LINE.fullmatch(finding) for finding in out[:-1]]
    assert None not in matches, "\n".join(out)
    return {match[2]: match[1] for match in matches if match is not None}


def doctor(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, list[str], str]:
    """Exit code, the lines on standard output, and standard error."""
    command = [sys.executable, "-m", "deploy", "doctor", *arguments]
    env = (os.environ if env is None else env) | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=env)
    assert "Traceback" not in done.stdout + done.stderr
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_a_line_is_one_line_with_its_fix() -> None:
    assert line("disk", 8, failed("it is\nfull", "make room")).plain == "fail  disk     it is full; make room"
    assert line("disk", 8, warned("[bold]", "see [/]")).plain == "warn  disk     [bold]; see [/]"


def test_a_wrong_recipe_ends_before_anything_is_looked_at() -> None:
    code, out, err = doctor("recipes/demo.yaml", "staleness.max_stalenes=1")
    assert (code, out) == (2, [])
    assert "did you mean 'max_staleness'?" in err
    assert doctor("recipes/none.yaml")[0] == 2


def test_a_package_that_is_missing_is_told_before_anything_needs_it(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError(\"No module named 'ray'\")\n")
    code, out, _ = doctor("recipes/demo.yaml", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert code == 1
    assert out == [
        "fail  packages  No module named 'ray'; make install, or on GPUs pip install -r deploy/requirements/gpu.txt"
    ]


def test_what_cannot_be_looked_at_is_skipped_and_the_rest_is_not(tmp_path: Path) -> None:
    """Neither a cluster nor a model: two failures, and no more of the same cause."""
    model = f"model={{kind: pretrained, path: {tmp_path}/none}}"
    code, out, _ = doctor("recipes/demo.yaml", model, f"run_dir={tmp_path}/run", "--address", "127.0.0.1:9")
    levels = levels_of(out)
    assert code == 1
    assert {name for name, level in levels.items() if level == "fail"} == {"ray", "model"}
    skipped = ("machines", "shared memory", "placement", "disk", "prompts", "tokenizer", "reward", "agreement")
    assert {levels[name] for name in skipped} == {"skip"}
    assert {levels[name] for name in ("python", "packages", "run folder", "dataset")} == {"pass"}


@pytest.mark.cluster
def test_the_demo_is_well_until_something_is_not(tmp_path: Path) -> None:
    """One command with what is right and what is wrong: a Ray is started, everything is looked at to the end."""
    (tmp_path / "bad.py").write_text("def bad(completions, **kwargs):\n    return [1 / 0 for _ in completions]\n")
    first = tmp_path / "first.yaml"
    first.write_text(Path("recipes/demo_sft.yaml").read_text() + f"run_dir: {tmp_path}/first\n")
    wrong = [f"rewards.functions=[{{function: '{tmp_path}/bad.py:bad'}}]", "generation.max_prompt_length=5"]
    code, out, _ = doctor("recipes/demo.yaml", f"model.recipe={first}", f"run_dir={tmp_path}/run", *wrong)
    levels = levels_of(out)
    assert code == 1
    assert {name for name, level in levels.items() if level == "fail"} == {"demo: prompts", "demo: reward"}
    well = ["python", "packages", "ray", "machines", "shared memory", "limits", "ports"]
    well += [
        f"{name}: {check}"
        for name in ("demo-sft", "demo")
        for check in ("placement", "run folder", "disk", "dataset", "model", "tokenizer")
    ]
    assert {name: levels[name] for name in well if levels[name] not in ("pass", "warn")} == {}
    assert out[-1].startswith("2 fail, "), "it ended before its end: Ray ends a process whose head is gone"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.py", "first.yaml"], "it leaves nothing behind"


@ONLY_PROVE
@pytest.mark.cluster
def test_a_cluster_of_two_nodes_is_looked_at(machines: Machines, tmp_path: Path) -> None:
    """With its token; with another one; and when its head is gone."""
    machines.rollout_node()
    recipe = ["recipes/demo.yaml", f"run_dir={tmp_path}/run", "model={kind: tiny, hidden_size: 64, num_heads: 1}"]
    recipe += ["--address", machines.address]
    code, out, _ = doctor(*recipe, env=machines.env)
    levels = levels_of(out)
    assert code == 0, out
    seen = ("ray", "machines", "same packages", "shared memory", "limits", "ports", "placement", "shared storage")
    assert {name: levels[name] for name in seen if levels[name] not in ("pass", "warn")} == {}
    assert any(each.startswith("pass  ray") and "2 nodes" in each for each in out), out
    assert list(tmp_path.glob(".doctor-*")) == []
    code, out, _ = doctor(*recipe, env=machines.env | {"RAY_AUTH_TOKEN": "another"})
    assert code == 1
    (refusal,) = (each for each in out if each.startswith("fail"))
    assert "has another token than the one that is set here; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in refusal
    machines.close()
    code, out, _ = doctor(*recipe, env=machines.env)
    assert code == 1
    assert any(each.startswith("fail  ray") and f"{machines.address}: nobody answers" in each for each in out), out
    assert levels_of(out)["dataset"] == "pass", "what needs no cluster is looked at all the same"
