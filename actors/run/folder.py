"""Everything that a run leaves behind is in one folder, and the recipe that made it is written there first.

recipe.yaml       the resolved recipe: `python -m deploy train recipe.yaml` makes the run again
placement.json    on which node each worker was when the run began, or last went on
metrics.jsonl     one JSON object per step, under TRL's metric names
ledger.jsonl      what became of every prompt group
completions/      samples of what the policy said, one file per sampled step
initial_model/    the model that the run began with, where the recipe asks for a tiny one
reference_logprobs.msgpack    what the policy said of preferences before its first step; other runs have none
model/            the trained weights and tokenizer in Hugging Face layout; of adapters, merged, with adapter/ in peft's
critic/           of PPO: the critic's weights and tokenizer, likewise
checkpoints/      cuts from which the same command goes on when the run was ended before its time
summary.json      the figures of the whole run; written last
scale.json        what `python -m deploy scale` asks of the run, until it is taken; and the answer in scale_answer.json
stall.txt         of a run that stalled: the suspect, what waits for what, and the stack of every process
reward.png        reward and staleness over the steps; loss.png where nothing is sampled
wandb_id          the run's id at Weights & Biases, when it is tracked there
"""

import contextlib
import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.errors import RunError
from actors.recipe.file import dump_recipe
from actors.recipe.schema import Recipe

_LOCK = ".lock"


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()  # the actors work in other directories

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def critic(self) -> Path:
        return self.path / "critic"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def plot(self) -> Path:
        return self.path / "reward.png"

    @property
    def stall(self) -> Path:
        return self.path / "stall.txt"

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether a run ended here: the summary is written last."""
        return (self.path / "summary.json").exists()

    def check_free(self, overwrite: bool) -> None:
        """ValueError when the folder holds another run that may not be overwritten, or something else altogether."""
        there = next(place for place in (self.path, *self.path.parents) if os.path.lexists(place))
        if not there.is_dir():
            raise ValueError(f"run_dir: {there} is no folder; choose another with run_dir=...")
        if there != self.path or all(entry.name == _LOCK for entry in self.path.iterdir()):
            return
        if not self.recipe.exists():
            raise ValueError(f"run_dir: {self.path} exists and is not a run folder; choose another with run_dir=...")
        if not overwrite:
            raise ValueError(
                f"run_dir: {self.path} already holds a run; choose another with run_dir=..., "
                "or replace it with --overwrite"
            )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """No other process trains in the folder meanwhile; RunError when one does already."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Of a file, which NFS locks everywhere.
            descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunError(
                f"run_dir: {error.filename or self.path} cannot be written: {error.strerror}; mend that, or choose "
                "another folder with run_dir=..."
            ) from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # is given back when the process ends, however
            except BlockingIOError:
                raise RunError(f"run_dir: another process is training in {self.path}; wait for it, or end it") from None
            except OSError as error:
                raise RunError(
                    f"run_dir: {self.path} cannot be locked ({error.strerror}), so two processes might train in it; "
                    "choose a folder on a file system that knows locks"
                ) from None
            yield
        finally:
            os.close(descriptor)

    def create(self, recipe: Recipe, overwrite: bool) -> None:
        """Start a new run here; ValueError as in `check_free`."""
        self.check_free(overwrite)
        self.path.mkdir(parents=True, exist_ok=True)
        # In this order: killed anywhere, what is left is a run folder, and none that goes on with the old run.
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        self._write_recipe(recipe)
        for entry in self.path.iterdir():
            if entry.name not in (_LOCK, self.recipe.name):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        (self.path / "completions").mkdir()

    def rewind(self, recipe: Recipe, version: int) -> None:
        """Go on with the run that is here at `version`: metrics of later steps were of weights that are gone."""
        kept = [line for line in self.read_metrics() if line["step"] < version]
        staged = self.path / "metrics.jsonl.staged"
        staged.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        staged.rename(self.path / "metrics.jsonl")
        self._write_recipe(recipe)

    def write_placement(self, nodes: Mapping[str, Sequence[str]]) -> None:
        """The node of each worker, by pool."""
        staged = self.path / "placement.json.staged"
        staged.write_text(json.dumps(nodes, indent=2) + "\n", encoding="utf-8")
        staged.rename(self.path / "placement.json")

    def _write_recipe(self, recipe: Recipe) -> None:
        staged = self.path / "recipe.yaml.staged"
        dump_recipe(recipe, staged)
        staged.rename(self.recipe)

    def write_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line; a value that is not finite is left out, because JSON has none."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")

    def read_metrics(self) -> list[dict[str, float]]:
        """Every whole line; a process that is killed can tear the last one. RunError names one that is none of ours."""
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        found: list[dict[str, float]] = []
        for number, line in enumerate(lines, start=1):
            try:
                metrics = json.loads(line)
                is_ours = isinstance(metrics["step"], int)
            except (ValueError, LookupError, TypeError, RecursionError):
                is_ours = False
            if not is_ours:
                raise RunError(
                    f"{path}: line {number} is not the metrics of a step; remove it, and give the command again"
                )
            found.append(metrics)
        return found

    def write_completions(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        path = self.path / "completions" / f"step_{step:05d}.jsonl"
        path.write_text("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples), encoding="utf-8")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        staged = self.path / "summary.json.staged"
        staged.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        staged.rename(self.path / "summary.json")

    def read_summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        return summary
