"""Nobody computes on GPUs whose numbers are of another machine."""

from types import SimpleNamespace

import pytest
import ray

from placement.home import NODE_ID, check_home
from placement.plan import PlacementError


def test_a_worker_that_was_built_again_elsewhere_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    monkeypatch.delenv(NODE_ID, raising=False)
    check_home()
    monkeypatch.setenv(NODE_ID, "here")
    check_home()
    monkeypatch.setenv(NODE_ID, "there")
    with pytest.raises(PlacementError, match="gone with their machine; give the command again"):
        check_home()
