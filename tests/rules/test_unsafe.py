"""The product runs nothing that it reads: no pickle of a file, no shell, no eval, no model's code unless asked."""

import pytest

from actors.recipe.model import PretrainedModel
from tests.rules.product import sources
from tests.rules.unsafe import unsafe

ALLOWED = {
    "actors/recipe/plain_yaml.py: yaml.load(text, _Loader)": "_Loader is PyYAML's safe one, and knows plain data alone"
}


def test_nothing_that_is_read_is_run() -> None:
    found = {f"{path}: {place}" for path, source in sources().items() for place in unsafe(source)}
    assert found == set(ALLOWED), "not allowed, or allowed in vain"


def test_the_code_of_a_model_is_not_run_unless_asked() -> None:
    assert PretrainedModel(kind="pretrained", path="x/y").trust_remote_code is False


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import cloudpickle as cp",
        "from pickle import load",
        "from ray.cloudpickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "load(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "exec(text)",
        "os.system('ls')",
        "subprocess.run('ls', shell=True, timeout=1)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "numpy.load(path, allow_pickle=True)",
        "class Settings:\n    trust_remote_code: bool = True",
    ],
)
def test_what_would_run_what_it_reads_is_found(source: str) -> None:
    assert unsafe(source)


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "yaml.safe_load(text)",
        "model.eval()",
        "AutoModel.from_pretrained(path, trust_remote_code=settings.trust_remote_code)",
        "class Settings:\n    trust_remote_code: bool = False",
    ],
)
def test_what_is_safe_is_left_alone(source: str) -> None:
    assert not unsafe(source)
