"""A live cluster that a recipe does not fit on is told in one sentence."""

import pytest

from actors.errors import RunError
from actors.recipe.file import load_recipe
from deploy import train
from placement import live


def test_a_cluster_that_is_too_small_ends_the_run_with_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"NodeID": "a", "Alive": True, "Resources": {"CPU": 1.0}, "NodeManagerHostname": "a"}
    monkeypatch.setattr(live.ray, "nodes", lambda: [node])
    recipe = load_recipe("recipes/demo.yaml", ("pools.rollout.gpus_per_worker=1",))
    with pytest.raises(RunError, match="pool 'rollout'"):
        train._reserved(recipe)
