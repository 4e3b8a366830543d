"""The images are built from what is there and pinned, run as nobody special, and fit the manifests."""

import re
from pathlib import Path

import pytest

from deploy.manifest.inputs import IMAGE
from deploy.manifest.options import APP, ManifestOptions
from deploy.manifest.pods import head_pod
from tests.deploy.dockerfile import instructions, problems

ROOT = Path(__file__).parents[2]
IMAGES = {"gpu": ROOT / "deploy/Dockerfile", "cpu": ROOT / "deploy/Dockerfile.cpu"}
PACKAGES = {*IMAGE}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_breaks_no_rule(name: str) -> None:
    assert problems(IMAGES[name].read_text(), ROOT) == []


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_holds_the_project_and_its_own_requirements(name: str) -> None:
    found = instructions(IMAGES[name].read_text())
    copied = {i.rest.split()[0] for i in found if i.word == "COPY" and not i.rest.startswith("--from")}
    assert copied == PACKAGES | {f"deploy/requirements/{name}.txt"}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_what_the_manifests_count_on(name: str) -> None:
    found = instructions(IMAGES[name].read_text())
    pod = head_pod(ManifestOptions(image="i"))["spec"]
    assert [i.rest for i in found if i.word == "WORKDIR"] == [APP] == [pod["containers"][0]["workingDir"]]
    user = next(i.rest for i in reversed(found) if i.word == "USER")
    assert user == "{runAsUser}:{fsGroup}".format(**pod["securityContext"])
    assert f"useradd --create-home --uid {pod['securityContext']['runAsUser']} " in IMAGES[name].read_text()
    assert f"PYTHONPATH={APP}" in IMAGES[name].read_text()


def test_the_toolkit_is_the_one_that_torch_is_pinned_with() -> None:
    pinned = re.search(r"^cuda-toolkit==(\d+\.\d+)", (ROOT / "deploy/requirements/gpu.txt").read_text(), re.M)
    base = re.search(r"^FROM nvidia/cuda:(\d+\.\d+)", IMAGES["gpu"].read_text(), re.M)
    assert pinned is not None
    assert base is not None
    assert pinned[1] == base[1]


def test_both_images_have_one_python() -> None:
    (gpu,), (cpu,) = (re.findall(r"^FROM (python:\S+)", path.read_text(), re.M) for path in IMAGES.values())
    assert gpu == cpu
    assert gpu.startswith("python:3.11.")


def installed(commands: str, requirements: str) -> list[str]:
    """What each `pip install` is told, but for how it is to go about it."""
    plain = commands.replace("\\\n", " ").replace("$$", "$").replace(requirements, "REQUIREMENTS")
    found = re.findall(r"(?:pip|\$\(PIP\)) install ((?:\"[^\"]*\"|[^\"&|\n])*)", plain)
    how = {"--no-cache-dir", "--disable-pip-version-check"}
    return [" ".join(word for word in arguments.split() if word not in how) for arguments in found]


def test_the_image_for_cpus_installs_what_make_install_does() -> None:
    """In the same order, and of the same file; the packages of tests and checks come after it in `make install`."""
    make, image = (ROOT / "Makefile").read_text(), IMAGES["cpu"].read_text()
    assert "$(VENV)/.cpu: $(REQUIREMENTS)/cpu.txt\n" in make
    assert "COPY deploy/requirements/cpu.txt /tmp/cpu.txt\n" in image
    rule = make.partition("$(VENV)/.cpu: ")[2].partition("\n\n")[0]
    expected = ["--no-deps \"$(grep '^torch==' REQUIREMENTS)\"", "--no-deps -r REQUIREMENTS"]
    assert installed(rule, "$<") == installed(image, "/tmp/cpu.txt") == expected


MUTANTS = {
    "a base without a tag": ("FROM python:3.11.14-slim-bookworm", "FROM python", "base is not pinned"),
    "a base that moves": ("FROM python:3.11.14-slim-bookworm", "FROM python:3.11-slim", "base is not pinned"),
    "the latest base": ("FROM python:3.11.14-slim-bookworm", "FROM python:latest", "base is not pinned"),
    "pipes that hide failures": ('SHELL ["/bin/bash", "-o", "pipefail", "-c"]', "", "no SHELL with pipefail"),
    "lists left behind": ("&& rm -rf /var/lib/apt/lists/*", "", "lists left behind"),
    "recommended packages": ("--no-install-recommends ", "", "--no-install-recommends"),
    "a question in the build": ("install -y", "install", "without -y"),
    "a cache in the image": ("--no-cache-dir ", "", "without --no-cache-dir"),
    "a package of any version": ("-r /tmp/cpu.txt", "ray", "not pinned: pip install"),
    "requirements that are not there": ("cpu.txt /tmp", "none.txt /tmp", "COPY of what is not there"),
    "requirements that were not copied": ("-r /tmp/cpu.txt", "-r /tmp/gpu.txt", "requirements that were not copied"),
    "a folder that is not there": ("COPY sync sync", "COPY synch sync", "COPY of what is not there: synch"),
    "a folder that stays at home": ("COPY sync sync", "COPY tests tests", ".dockerignore leaves out: tests"),
    "a folder somewhere": ("WORKDIR /app", "", "before an absolute WORKDIR"),
    "a download": ("COPY sync sync", "ADD sync sync", "ADD: use COPY"),
    "root": ("USER 1000:1000", "USER root", "the last USER is not a number above 0"),
    "root by number": ("USER 1000:1000", "USER 0", "the last USER is not a number above 0"),
    "nobody at all": ("USER 1000:1000", "", "the last USER is not a number above 0"),
    "a shell around the command": ('CMD ["python", "-m", "deploy", "--help"]', "CMD python", "CMD is not in JSON"),
    "two layers for one": ("ENV PATH", "RUN true\nRUN true\nENV PATH", "two RUNs in a row"),
    "a way around WORKDIR": ("    && rm /tmp/cpu.txt", "    && cd /tmp && rm cpu.txt", "sudo, apt or cd"),
    "an index of packages": ('TORCH_INDEX=""', 'TORCH_INDEX="https://example.org/wheels"', "a registry's address"),
    "another registry": ("FROM python:3.11.14", "FROM registry.example.org/python:3.11.14", "a registry's address"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_what_is_wrong_is_found(name: str) -> None:
    right, wrong, problem = MUTANTS[name]
    text = IMAGES["cpu"].read_text()
    assert right in text
    mutant = text.replace(right, wrong)
    assert any(problem in found for found in problems(mutant, ROOT)), problems(mutant, ROOT)
