"""Each folder's docstring maps it: whoever looks for something finds every file of the folder there."""

import ast
import re
from pathlib import Path

import pytest

from tests.rules.product import FOLDERS, ROOT

PACKAGES = sorted(path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py"))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_is_on_the_map_of_its_folder(package: Path) -> None:
    told = ast.get_docstring(ast.parse((package / "__init__.py").read_text("utf-8"))) or ""
    files = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert files | folders <= set(re.findall(r"\w+\.py|\w+/", told))
