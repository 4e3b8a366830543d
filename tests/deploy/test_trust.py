"""A model whose own code runs is named with its revision, by `plan` and by `train`."""

from actors.recipe.file import load_recipe
from deploy.trust import trusted_code

MODEL = "model={kind: pretrained, path: a/b, trust_remote_code: %s}"


def test_code_that_is_trusted_is_told_once_with_its_revision() -> None:
    off = load_recipe("recipes/demo.yaml", [MODEL % "false"])
    on = load_recipe("recipes/demo.yaml", [MODEL % "true"])
    pinned = load_recipe("recipes/demo.yaml", [MODEL % "true, revision: abc"])
    assert trusted_code([off]) == []
    assert len(trusted_code([on, on])) == 1
    assert "a/b, of whatever revision is the newest then" in trusted_code([on])[0]
    assert "a/b, of revision abc" in trusted_code([pinned])[0]
