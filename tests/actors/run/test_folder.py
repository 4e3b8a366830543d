"""A run folder is never shared by two runs, and what was written can be read back."""

import contextlib
import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from actors.errors import RunError
from actors.recipe.file import load_recipe
from actors.run.folder import RunFolder
from actors.run.plot import plot_loss, plot_run

RECIPE = load_recipe("recipes/demo.yaml")


def test_the_resolved_recipe_comes_first_and_loads_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create(RECIPE, overwrite=False)
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == RECIPE
    assert not folder.finished
    folder.write_summary({"steps": 3})
    assert folder.finished
    assert folder.read_summary() == {"steps": 3}


def test_another_run_is_not_written_over(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create(RECIPE, overwrite=False)
    folder.write_summary({})
    with pytest.raises(ValueError, match=r"already holds a run.*--overwrite"):
        folder.create(RECIPE, overwrite=False)
    folder.create(RECIPE, overwrite=True)
    assert not folder.finished


def test_one_process_trains_in_a_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.held():
        folder.create(RECIPE, overwrite=False)
        with pytest.raises(RunError, match="another process is training"), folder.held():
            pass
        folder.create(RECIPE, overwrite=True)
        with pytest.raises(RunError, match="another process is training"), folder.held():
            pass
    with folder.held():
        pass  # given back


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("actors.run.folder.fcntl.flock", unknown)
    with pytest.raises(RunError, match=r"cannot be locked \(Operation not supported\)"), RunFolder(tmp_path).held():
        pass


def test_what_is_left_of_an_overwriting_that_was_killed_is_not_the_old_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before any of the deletions and the writing of the recipe: a run folder, without the old checkpoints."""
    for num_deleted in range(4):
        folder = RunFolder(tmp_path / str(num_deleted))
        folder.create(RECIPE, overwrite=False)
        folder.write_summary({})
        (folder.checkpoints / "version-00000003").mkdir(parents=True)
        left = iter(range(num_deleted))

        def dying(path: Path, *, real: Callable[[Path], None] = Path.unlink, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            real(path)

        monkeypatch.setattr(Path, "unlink", dying)
        with contextlib.suppress(KeyboardInterrupt):
            folder.create(RECIPE, overwrite=True)
        monkeypatch.undo()
        assert not folder.checkpoints.exists()
        folder.create(RECIPE, overwrite=True)


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not a run folder"):
        RunFolder(tmp_path).create(RECIPE, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_what_is_no_folder_and_cannot_be_one_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in ("file", "file/below/it", "link"):
        with pytest.raises(ValueError, match=r"run_dir: .*/(file|link) is no folder; choose another"):
            RunFolder(tmp_path / place).check_free(overwrite=True)
        with pytest.raises(RunError, match=r"run_dir: .* cannot be written: "), RunFolder(tmp_path / place).held():
            pass
    RunFolder(tmp_path / "new" / "one").check_free(overwrite=False)


@pytest.mark.parametrize("line", [b"\0\0\0", b"\xff", b"[1]", b"3", b"{}", b'{"step": "x"}', b"[" * 100_000])
def test_metrics_that_are_damaged_are_named(line: bytes, tmp_path: Path) -> None:
    """A run that goes on reads them first, when Ray is there already."""
    folder = RunFolder(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 2}\n{"st')
    with pytest.raises(RunError, match=r"metrics.jsonl: line 2 is not the metrics of a step"):
        folder.rewind(RECIPE, 1)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n{"step": 2}\n{"st')
    assert folder.read_metrics() == [{"step": 0}, {"step": 2}]


def test_metrics_are_json_even_when_a_value_is_not_finite(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create(RECIPE, overwrite=False)
    folder.write_metrics(0, {"reward": 0.5, "loss": float("nan")})
    folder.write_metrics(1, {"reward": 0.75, "grad_norm": float("inf")})
    assert folder.read_metrics() == [{"step": 0, "reward": 0.5}, {"step": 1, "reward": 0.75}]
    folder.write_completions(1, [{"prompt": "é", "completion": "\n"}])
    assert json.loads((tmp_path / "completions" / "step_00001.jsonl").read_text()) == {
        "prompt": "é",
        "completion": "\n",
    }


@pytest.mark.parametrize("rewards", [[1e308], [1e308, -1e308, 1.0], [-1e200, 1e200]])
def test_a_run_that_is_finished_does_not_fail_for_its_picture(rewards: list[float], tmp_path: Path) -> None:
    plot_run([{"step": step, "reward": reward} for step, reward in enumerate(rewards)], 2, tmp_path / "reward.png")
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_the_plots_are_pictures(tmp_path: Path) -> None:
    rows = [{"step": i, "reward": i / 9, "loss": 1.0, "staleness/max": i % 3, "staleness/mean": 0.5} for i in range(10)]
    plot_run(rows, 2, tmp_path / "reward.png")
    plot_loss(rows, tmp_path / "loss.png")
    for name in ("reward.png", "loss.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
