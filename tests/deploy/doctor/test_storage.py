"""A run folder that cannot take what a run writes is told before the run."""

import os
from pathlib import Path

import pytest

from actors.checkpoint.config import BestConfig, CheckpointConfig
from actors.recipe.file import load_recipe
from deploy.doctor.machine import GB
from deploy.doctor.storage import (
    bytes_needed,
    bytes_of,
    check_disk,
    check_shared,
    check_writable,
    free_bytes,
)


def test_a_folder_that_is_not_there_yet_is_tried_above_and_not_made(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    assert check_writable(folder).level == "pass"
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    found = check_writable(tmp_path / "runs" / "mine")
    assert found.level == "fail"
    assert found.text.endswith("runs is a file")


def test_a_file_system_that_takes_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "fsync", refuse)
    found = check_writable(tmp_path)
    assert found.level == "fail"
    assert "Read-only file system" in found.text
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not a run folder" in check_writable(tmp_path).text
    (tmp_path / "recipe.yaml").write_text("kind: grpo")
    assert check_writable(tmp_path).text.endswith("holds a run: `train` begins it anew")
    (tmp_path / "checkpoints" / "version-00000040").mkdir(parents=True)
    assert check_writable(tmp_path).text.endswith("holds a run: `train` goes on from its step 40")
    (tmp_path / "summary.json").write_text("{}")
    found = check_writable(tmp_path)
    assert (found.level, "--overwrite" in found.fix) == ("warn", True)


@pytest.mark.parametrize(("free_gb", "level"), [(10.0, "fail"), (50.0, "warn"), (70.0, "pass")])
def test_a_disk_holds_all_checkpoints_and_the_model(free_gb: float, level: str) -> None:
    """Of 1 B parameters: three of 12 GB, and 4 GB."""
    needed = bytes_of(1_000_000_000, 1_000_000_000, CheckpointConfig(keep=2))
    assert needed == 40e9
    assert check_disk(free_gb * GB, needed, 2, Path("runs/x")).level == level


def test_the_best_checkpoint_takes_room_and_adapters_take_little() -> None:
    best = CheckpointConfig(keep=2, best=BestConfig())
    assert bytes_of(1000, 1000, best) == 4 * 12_000 + 4000
    assert bytes_of(1_000_000, 1000, best) == 4 * 12_000 + 4_000_000


def test_a_disk_that_is_full_of_what_will_be_replaced_has_room(tmp_path: Path) -> None:
    before = free_bytes(tmp_path)
    old = tmp_path / "checkpoints" / "version-00000001" / "model"
    old.mkdir(parents=True)
    with (old / "weights").open("wb") as file:
        file.truncate(2**40)  # sparse: it takes no room
    assert free_bytes(tmp_path) - before == pytest.approx(2**40, rel=0.01)


def test_a_tiny_model_is_counted_and_one_that_is_not_here_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    demo = load_recipe("recipes/demo.yaml")
    assert bytes_needed(demo) == pytest.approx(1.13e6 * 40, rel=0.05)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    large = load_recipe("recipes/demo.yaml", ["model={kind: pretrained, path: nobody/nothing}"])
    assert bytes_needed(large) is None
    assert check_disk(1e9, None, 2, Path("runs/x")).level == "skip"


def test_a_node_that_does_not_see_the_folder_is_named() -> None:
    folder = Path("/shared/run")
    assert check_shared(folder, {"a": True, "b": True}).level == "pass"
    found = check_shared(folder, {"a": True, "node-b": False})
    assert found.level == "fail"
    assert "is not what node-b sees" in found.text
