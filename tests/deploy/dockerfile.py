"""What is wrong with a Dockerfile, by the rules of hadolint that matter here and by ours; no Docker is needed."""

import fnmatch
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_REGISTRY = re.compile(r"https?://|\b[\w-]+(\.[\w-]+)+(:\d+)?/|--(extra-)?index[-]url[ =]\S*\.|--find-links")


@dataclass(frozen=True)
class Instruction:
    word: str
    rest: str


def instructions(text: str) -> list[Instruction]:
    """The instructions in order, continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    words = (line.strip().partition(" ") for line in joined.splitlines() if line.strip())
    return [Instruction(word.upper(), rest.strip()) for word, _, rest in words]


def problems(text: str, root: Path) -> list[str]:
    """Every rule that is broken."""
    found = instructions(text)
    return [
        *_bases(found),
        *_commands(found),
        *_copies(found, root),
        *_ends(found),
        *(f"a registry's address: {line.strip()}" for line in text.splitlines() if _names_registry(line)),
    ]


def _names_registry(line: str) -> bool:
    return not line.lstrip().startswith("#") and _REGISTRY.search(line) is not None


def _bases(found: list[Instruction]) -> Iterator[str]:
    """DL3006, DL3007: each base has a tag, with all of its numbers."""
    for base in (instruction.rest for instruction in found if instruction.word == "FROM"):
        _, _, tag = base.split()[0].partition(":")
        if not re.match(r"\d+\.\d+\.\d+-", tag):
            yield f"base is not pinned: {base}"


def _commands(found: list[Instruction]) -> Iterator[str]:
    """DL3008 to DL3059, as far as they concern what is run here."""
    shell = False
    for before, instruction in zip([None, *found], found, strict=False):
        shell |= instruction.word == "SHELL" and "pipefail" in instruction.rest
        if instruction.word == "ADD":
            yield "ADD: use COPY"
        if instruction.word != "RUN":
            continue
        command = instruction.rest
        if not shell:
            yield "no SHELL with pipefail before the first RUN"
        if before is not None and before.word == "RUN":
            yield f"two RUNs in a row: {command[:40]}"
        if re.search(r"\b(sudo|apt |cd )", command):
            yield f"sudo, apt or cd: {command[:40]}"
        if "apt-get install" in command:
            if "--no-install-recommends" not in command or " -y" not in command:
                yield "apt-get install without -y --no-install-recommends"
            if "apt-get update" not in command or "rm -rf /var/lib/apt/lists/*" not in command:
                yield "apt-get install without update before it, or with lists left behind"
        for install in re.findall(r"pip install [^&|;]*", command):
            if "--no-cache-dir" not in install:
                yield "pip install without --no-cache-dir"
            if "-r " not in install and "==" not in install:
                yield f"pip install of what is not pinned: {install}"


def _copies(found: list[Instruction], root: Path) -> Iterator[str]:
    """What is copied is there and in the context, and lies where a WORKDIR says."""
    workdir = False
    kept = [line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    files: set[str] = set()
    for instruction in found:
        workdir |= instruction.word == "WORKDIR" and instruction.rest.startswith("/")
        if instruction.word != "COPY" or instruction.rest.startswith("--from="):
            continue
        *sources, target = instruction.rest.split()
        for source in sources:
            if not (root / source).exists():
                yield f"COPY of what is not there: {source}"
            if not any(fnmatch.fnmatch(source.split("/")[0], name) for name in kept):
                yield f"COPY of what .dockerignore leaves out: {source}"
        if not workdir and not target.startswith("/"):
            yield f"COPY to {target} before an absolute WORKDIR"
        files.add(target)
    text = " ".join(instruction.rest for instruction in found if instruction.word == "RUN")
    for named in re.findall(r"-r (\S+)", text):
        if named not in files:
            yield f"requirements that were not copied: {named}"


def _ends(found: list[Instruction]) -> Iterator[str]:
    """DL3002, DL3025: the last user is nobody special, by number, so that Kubernetes can tell; CMD is a list."""
    users = [instruction.rest for instruction in found if instruction.word == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]):
        yield f"the last USER is not a number above 0: {users[-1:]}"
    for instruction in found:
        if instruction.word in ("CMD", "ENTRYPOINT") and not _is_list(instruction.rest):
            yield f"{instruction.word} is not in JSON"


def _is_list(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list)
    except ValueError:
        return False
