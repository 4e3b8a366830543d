"""`python -m deploy scale`: a run takes another number of replicas, or it is said why it cannot."""

import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from actors.recipe.file import load_recipe
from actors.run.folder import RunFolder
from actors.scaling import ScaleFiles
from deploy.__main__ import app

RECIPES = Path(__file__).parents[2] / "recipes"
ELASTIC = ("pools.rollout.num_workers=2", "pools.rollout.min_workers=1", "pools.rollout.max_workers=4")


def run_folder(path: Path, *overrides: str, recipe: str = "demo.yaml") -> RunFolder:
    folder = RunFolder(path / "run")
    folder.create(load_recipe(str(RECIPES / recipe), [*overrides, f"run_dir={folder.path}"]), overwrite=False)
    return folder


def scale(folder: Path, wish: str, *options: str) -> tuple[int, str]:
    """Exit code, and what was said."""
    done = CliRunner().invoke(app, ["scale", str(folder), wish, *options])
    return done.exit_code, done.output


@pytest.mark.parametrize(
    ("wish", "overrides", "message"),
    [
        ("rollout=5", ELASTIC, "rollout=5: the run's pools.rollout has min_workers=1 and max_workers=4"),
        ("rollout=0", ELASTIC, "rollout=0: the run's pools.rollout has min_workers=1"),
        ("rollout=3", (), "its replicas do not come and go"),
        ("policy=2", ELASTIC, "policy=2: only rollout replicas come and go"),
        ("rolout=2", ELASTIC, "there is no pool 'rolout'; write rollout=2"),
        ("rollout", ELASTIC, "'rollout': write POOL=N, such as rollout=4"),
        ("rollout=3", ELASTIC, "no process trains there now"),
    ],
)
def test_what_cannot_be_is_refused_in_one_message(
    tmp_path: Path, wish: str, overrides: tuple[str, ...], message: str
) -> None:
    code, said = scale(run_folder(tmp_path, *overrides).path, wish)
    assert (code, said.startswith("error: ")) == (2, True)
    assert message in said


def test_the_folder_of_a_run_that_kept_one_checkpoint_is_read(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, *ELASTIC)
    folder.recipe.write_text(folder.recipe.read_text().replace("keep: 2", "keep: 1"))
    assert "no process trains there now" in scale(folder.path, "rollout=3")[1]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    code, said = scale(tmp_path, "rollout=2")
    assert code == 2
    assert "is not the folder of a run" in said


def test_a_run_without_rollouts_is_refused(tmp_path: Path) -> None:
    code, said = scale(run_folder(tmp_path, recipe="demo_sft.yaml").path, "rollout=2")
    assert code == 2
    assert "a run of kind 'sft' has no rollout replicas" in said


def test_a_run_that_does_not_answer_is_not_left_with_the_request(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, *ELASTIC)
    with folder.held():
        code, said = scale(folder.path, "rollout=3", "--timeout-s", "1")
    assert code == 1
    assert "has not taken the request for 1 s, and it is taken back" in said
    assert ScaleFiles(folder.path).take(lambda wanted: None) is None


@pytest.mark.parametrize(("refusal", "code"), [(None, 0), ("the range has changed", 2)])
def test_a_run_answers_whether_it_takes_the_number(tmp_path: Path, refusal: str | None, code: int) -> None:
    folder = run_folder(tmp_path, *ELASTIC)
    files = ScaleFiles(folder.path)
    taken: list[int] = []
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(0.05):
            wanted = files.take(lambda wanted: refusal)
            taken.extend([] if wanted is None else [wanted])

    thread = threading.Thread(target=run)
    thread.start()
    try:
        with folder.held():
            done = scale(folder.path, "rollout=3")
    finally:
        stop.set()
        thread.join(10)
    assert done[0] == code, done
    assert taken == ([3] if refusal is None else [])
    assert (refusal or "taken: 3 rollout replicas") in done[1]
    assert not files.request.exists()


def test_a_request_that_is_none_of_ours_is_taken_away_and_changes_nothing(tmp_path: Path) -> None:
    files = ScaleFiles(tmp_path)
    for text in ("", "{", "[]", '{"rollout": "many"}', '{"id": "x"}'):
        files.request.write_text(text)
        assert files.take(lambda wanted: None) is None
        assert not files.request.exists()
