"""From which cut a run goes on, and what of its recipe may have changed."""

from dataclasses import replace
from pathlib import Path

import pytest

from actors.checkpoint.cut import Cut, Progress
from actors.checkpoint.resume import Resume, changes, find, with_rows
from actors.checkpoint.store import CheckpointStore
from actors.recipe.file import RecipeError, dump_recipe, load_recipe
from algorithms.slots import PacerState

DEMO = "recipes/demo.yaml"


@pytest.fixture
def run(tmp_path: Path) -> tuple[CheckpointStore, Path]:
    """Cuts of versions 10 and 20, and the recipe that made them."""
    store = CheckpointStore(tmp_path / "checkpoints")
    for version in (10, 20):
        Cut(version, 5, PacerState(version, 100, 40, (), ()), Progress()).write(store.stage(version), [])
        store.commit(version)
    dump_recipe(load_recipe(DEMO), tmp_path / "recipe.yaml")
    return store, tmp_path / "recipe.yaml"


def test_the_newest_is_taken(run: tuple[CheckpointStore, Path]) -> None:
    found = find(*run, load_recipe(DEMO), ())
    assert found is not None
    assert (found.cut.version, found.groups, found.notes) == (20, [], ())


def test_a_damaged_one_is_passed_over_and_told(run: tuple[CheckpointStore, Path]) -> None:
    store, recipe = run
    (store.path / "version-00000020" / "cut.json").write_text("{}")
    found = find(store, recipe, load_recipe(DEMO), ())
    assert found is not None
    assert found.cut.version == 10
    assert "passed over" in found.notes[0]
    (store.path / "version-00000010" / "groups.msgpack").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint is whole.*--overwrite"):
        find(store, recipe, load_recipe(DEMO), ())


def test_a_data_set_that_has_become_longer_or_shorter_is_refused() -> None:
    """The recipe is the same, and each ordinal would be another row."""
    cut = Cut(20, 5, PacerState(20, 100, 40, (), ()), Progress(), num_rows=1000)
    resume = Resume(Path("x"), cut, [], ("passed over",))
    for num_rows in (999, 1001):
        for other in ("steps", "dataset.prompt_suffix"):
            with pytest.raises(ValueError, match=rf"x.jsonl has {num_rows} rows and had 1000 .*--allow-change"):
                with_rows(resume, num_rows, "x.jsonl", [other])
        for allowed in ("dataset", "dataset.path", "dataset.size"):
            _, note = with_rows(resume, num_rows, "x.jsonl", [allowed]).notes
            assert note.startswith(f"the data set had 1000 rows and has {num_rows} from here on")
    assert with_rows(resume, 1000, "x.jsonl", ()) == resume
    older = replace(resume, cut=Cut(20, 5, PacerState(20, 100, 40, (), ()), Progress()))
    assert with_rows(older, 3, "x.jsonl", ()) == older


def test_how_it_computes_may_change(run: tuple[CheckpointStore, Path]) -> None:
    changed = load_recipe(DEMO, ["pools.rollout.num_workers=2", "policy.zero_stage=3", "sync.timeout_s=7"])
    found = find(*run, changed, ())
    assert found is not None
    assert len(found.notes) == 3


def test_who_computes_it_and_where_it_lies_may_change(run: tuple[CheckpointStore, Path]) -> None:
    teams = ["policy.sequence_parallel_size=2", "pools.policy.num_workers=2"]
    changed = load_recipe(
        DEMO, [*teams, "policy.offload={parameters: cpu}", "policy.zero_stage=3", "policy.liger=false"]
    )
    found = find(*run, changed, ())
    assert found is not None
    assert any(note.startswith("policy.sequence_parallel_size was 1 and is 2") for note in found.notes)


@pytest.mark.parametrize("override", ["algorithm.beta=0.1", "seed=5", "rollout.dtype=bfloat16", "groups_per_batch=8"])
def test_what_it_computes_may_not_but_by_name(run: tuple[CheckpointStore, Path], override: str) -> None:
    key, changed = override.split("=")[0], load_recipe(DEMO, [override])
    with pytest.raises(ValueError, match=f"{key} was .* when the run began.*--allow-change {key}"):
        find(*run, changed, ())
    found = find(*run, changed, [key])
    assert found is not None
    assert key in found.notes[0]


def test_arguments_where_there_were_none_are_told_whole(run: tuple[CheckpointStore, Path]) -> None:
    store, recipe = run
    key, schedule = "optimizer.lr_scheduler_kwargs", "optimizer.lr_scheduler_type=polynomial"
    plain, given = load_recipe(DEMO, [schedule]), load_recipe(DEMO, [schedule, f"{key}.power=2"])
    dump_recipe(plain, recipe)
    assert list(changes(recipe, plain)) == []
    assert list(changes(recipe, given)) == [(key, {}, {"power": 2})]
    with pytest.raises(ValueError, match=rf"{key} was {{}} when the run began and is {{'power': 2}} now"):
        find(store, recipe, given, ())
    dump_recipe(given, recipe)
    assert list(changes(recipe, plain)) == [(key, {"power": 2}, {})]
    assert list(changes(recipe, load_recipe(DEMO, [schedule, f"{key}.power=3"]))) == [(f"{key}.power", 2, 3)]


def test_what_was_null_is_told_key_by_key(run: tuple[CheckpointStore, Path]) -> None:
    found = list(changes(run[1], load_recipe(DEMO, ["policy.lora={r: 8}"])))
    assert ("policy.lora.r", None, 8) in found
    assert all(key.startswith("policy.lora.") and old is None for key, old, _ in found)


def test_a_run_that_kept_one_checkpoint_goes_on_with_two(run: tuple[CheckpointStore, Path]) -> None:
    """One was legal when it began; the user's own recipe is refused all the same."""
    recipe = run[1]
    text = recipe.read_text()
    recipe.write_text(text.replace("keep: 2", "keep: 1"))
    assert recipe.read_text() != text
    found = find(*run, load_recipe(DEMO, ["checkpoint.keep=2"]), ())
    assert found is not None
    assert (found.cut.version, found.notes) == (20, ())
    with pytest.raises(RecipeError, match=r"recipe.yaml: checkpoint.keep: 1 is out of range"):
        load_recipe(recipe)


def test_a_run_whose_warm_up_had_no_effect_goes_on_without_it(run: tuple[CheckpointStore, Path]) -> None:
    text = run[1].read_text()
    run[1].write_text(
        text.replace("lr_scheduler_type: constant_with_warmup", "lr_scheduler_type: constant").replace(
            "warmup_steps: 0", "warmup_steps: 10"
        )
    )
    with pytest.raises(RecipeError, match="lr_scheduler_type: constant has no warm-up"):
        load_recipe(run[1])
    assert not list(changes(run[1], load_recipe(DEMO, ["optimizer.lr_scheduler_type=constant"])))


def test_a_run_without_a_cut_has_none(tmp_path: Path) -> None:
    assert find(CheckpointStore(tmp_path), tmp_path / "recipe.yaml", load_recipe(DEMO), ()) is None
