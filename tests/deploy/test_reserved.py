"""A cluster that is too small or too busy is the user's to mend while nothing has begun."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest

from actors.errors import RunError
from actors.recipe.file import load_recipe
from deploy import train
from deploy.session import ClusterError
from placement import live
from placement.groups import Singly
from placement.plan import PlacementError

DEMO = str(Path(__file__).parents[2] / "recipes" / "demo.yaml")


@pytest.mark.parametrize(("begun", "error"), [(False, ClusterError), (True, RunError)])
def test_what_cannot_be_reserved_is_told_with_the_runs_name(
    begun: bool, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> NoReturn:
        raise PlacementError("not reserved within 120 s: pool 'policy'")

    monkeypatch.setattr(train, "plan_now", lambda *_: None)
    monkeypatch.setattr(train, "reserve", refused)
    with pytest.raises(error, match=r"^demo: not reserved within 120 s: pool 'policy'"):
        train._reserved(load_recipe(DEMO), begun)


@pytest.mark.parametrize(("begun", "error"), [(False, ClusterError), (True, RunError)])
def test_a_cluster_that_is_too_small_is_told_with_what_is_missing(
    begun: bool, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = {"NodeID": "a", "Alive": True, "Resources": {"CPU": 1.0}, "NodeManagerHostname": "a"}
    monkeypatch.setattr(live.ray, "nodes", lambda: [node])
    with pytest.raises(error, match=r"^demo: pool 'rollout'"):
        train._reserved(load_recipe(DEMO, ["pools.rollout.gpus_per_worker=1"]), begun)


def test_replicas_that_come_and_go_are_planned_from_all_to_the_fewest(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def planned(pools: Mapping[str, Any], fewer: Any) -> None:
        seen.extend(each["rollout"].num_workers for each in (pools, *fewer))

    monkeypatch.setattr(train, "plan_now", planned)
    monkeypatch.setattr(train, "reserve", lambda _, timeout_s, singly: singly)
    recipe = load_recipe(DEMO, ["pools.rollout.num_workers=4", "pools.rollout.min_workers=2"])
    reserved: Any = train._reserved(recipe, False)
    assert (seen, reserved) == ([4, 3, 2], {"rollout": Singly(2, 4)})
