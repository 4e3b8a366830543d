"""A local Ray for the tests that need one, and tiny models made once."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import settings

from actors.recipe.model import TinyModel
from tests.prove import PROVING

# A busy machine is no failure. The same examples each time, so that a change is not refused for what it did not touch;
# `make prove` searches at random.
settings.register_profile("paceline", deadline=None, derandomize=not PROVING)
settings.load_profile("paceline")


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """What a test's commands leave in the environment, such as the token of a Ray of their own, ends with the test."""
    with patch.dict(os.environ):
        yield


@pytest.fixture(autouse=True)
def draws_of_its_own() -> None:
    """What a test draws from torch's own generator does not depend on who drew before it in the same process."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`tied` and `untied` tiny models on disk, and a second untied one with other weights."""
    from actors.model.tiny import make_tiny_model

    folder = tmp_path_factory.mktemp("models")
    config = {"hidden_size": 64, "num_layers": 2, "num_heads": 1}
    for name, tied, seed in (("tied", True, 0), ("untied", False, 0), ("other", False, 1)):
        make_tiny_model(TinyModel(kind="tiny", tie_word_embeddings=tied, **config), folder / name, seed)
    return {name: folder / name for name in ("tied", "untied", "other")}


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """One Ray for the tests of a file, with logical CPUs enough for every pool."""
    import ray

    root = str(Path(__file__).parents[1])
    env = {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
    os.environ.pop("RAY_ADDRESS", None)
    with patch.dict(os.environ, RAY_prestart_worker_first_driver="0"):  # a process for each CPU; few are used here
        ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": env})
    yield
    ray.shutdown()
