"""A run is tracked by Weights & Biases only when its recipe asks; the run folder has every metric in any case.

However often the run goes on, and from whatever step, it is one run there: its id lies in the run folder. W&B drops
what is logged for a step that it has passed, so the step is a metric of ours, over which all others are drawn; what a
run took twice, because it went back, is there twice. What is wrong with key or project is told before anything starts;
after that no run stops for its tracker: it goes on without, with a warning, and keeps what it can for `wandb sync`.
"""

import contextlib
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import psutil

from actors.run.machine import answers

_INIT_TIMEOUT_S = 60.0
_FINISH_TIMEOUT_S = 120.0
"""A run does not wait longer for its last metrics to be uploaded; `wandb sync` can do that later."""

_LOG_TIMEOUT_S = 20.0
"""To hand a step's metrics to W&B's own process, which takes milliseconds; the loop stands still meanwhile."""

_KILL_TIMEOUT_S = 5.0

_STEP = "step"


def _run_id(folder: Path, new: str) -> str:
    """Of the run in the folder, there; `new` when it has none yet."""
    path = folder / "wandb_id"
    if path.exists():
        return path.read_text(encoding="utf-8").strip()
    staged = folder / "wandb_id.staged"
    staged.write_text(new + "\n", encoding="utf-8")
    staged.rename(path)  # half an id would be another run's
    return new


def check_tracker(project: str | None) -> None:
    """ValueError when a project is asked for that can have no such name, or there is no key to reach it with, or a key
    that is refused. A service that is away is no error: it may be there when the run is."""
    if project is None:
        return
    import wandb

    try:
        wandb.Settings(project=project)
    except wandb.errors.UsageError as error:
        raise ValueError(f"logging.wandb_project: {error}; choose another name") from None
    if os.environ.get("WANDB_MODE", "online") != "online":
        return
    if not wandb.api.api_key:
        raise ValueError(
            "logging.wandb_project: there is no Weights & Biases key; set WANDB_API_KEY, or WANDB_MODE=offline to keep "
            "the metrics in the run folder"
        )
    service = urlsplit(wandb.setup().settings.base_url)
    if not answers(f"{service.hostname}:{service.port or (80 if service.scheme == 'http' else 443)}"):
        return  # asking for the key's worth would be tried again for a minute and a half
    try:
        wandb.login(verify=True)
    except wandb.errors.AuthenticationError as error:
        raise ValueError(
            f"logging.wandb_project: the Weights & Biases key is refused ({error}); set WANDB_API_KEY to one of an "
            "account that may write to the project, or WANDB_MODE=offline to keep the metrics in the run folder"
        ) from None


class Tracker:
    """Metrics of each step, sent to a project or, without one, nowhere."""

    def __init__(
        self, project: str | None, name: str, folder: Path, config: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        """The key comes from the environment (WANDB_API_KEY).

        WANDB_MODE=offline keeps everything in `folder`, in a folder of its own for each process of the run; so it is
        when the service cannot be reached, or refuses the run.
        """
        self._run: Any = None
        self._say = say
        if project is None:
            return
        import wandb

        with self._no_reason_to_stop("the metrics stay in the run folder, where metrics.jsonl has all of them"):
            run_id = _run_id(folder, os.environ.get("WANDB_RUN_ID") or secrets.token_hex(8))
            with self._no_reason_to_stop(f"`wandb sync {folder}/wandb/offline-*` sends what is kept there meanwhile"):
                self._run = _begun(project, name, folder, config, run_id, offline=False)
            if self._run is None:
                wandb.teardown()  # its process holds the id for the run that has failed
                self._run = _begun(project, name, folder, config, run_id, offline=True)

    @contextlib.contextmanager
    def _no_reason_to_stop(self, instead: str) -> Iterator[None]:
        """An error of the tracker is told, and the run goes on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  of its service, its process, its disk: it is a copy of metrics.jsonl
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._say(f"warning: logging.wandb_project: Weights & Biases fails ({why}); {instead}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._run is None:
            return
        run, self._run = self._run, None  # one that fails is not asked again
        with self._no_reason_to_stop("metrics.jsonl in the run folder has all metrics"):
            _in_time(_LOG_TIMEOUT_S, lambda: run.log({_STEP: step, **metrics}))
            self._run = run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._run is None:
            return
        with self._no_reason_to_stop("metrics.jsonl in the run folder has all metrics"):
            _in_time(2 * _FINISH_TIMEOUT_S, lambda: self._run.finish(exit_code=int(kind is not None)))


def _in_time(seconds: float, call: Callable[[], object]) -> None:
    """TimeoutError when the call is not back by then. What hangs is W&B's own process, which is ended: else the end of
    ours would wait for it."""
    done: Future[object] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except Exception as error:  # noqa: BLE001  whoever waits is told
            done.set_exception(error)

    threading.Thread(target=run, name="tracker", daemon=True).start()
    try:
        done.result(seconds)
    except TimeoutError:
        if done.done():  # meanwhile, or by an error of the same type
            done.result(0.0)
            return
        if _killed():
            with contextlib.suppress(Exception):  # it mourns its process; at our end it would do so with a traceback
                import wandb

                wandb.teardown()
        raise TimeoutError(f"its process has not answered for {seconds:g} s") from None


def _killed() -> bool:
    """W&B's own process, if there is one, is gone when this returns."""
    ours = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name().startswith("wandb"):
                child.kill()
                ours.append(child)
    _, alive = psutil.wait_procs(ours, timeout=_KILL_TIMEOUT_S)
    return bool(ours) and not alive


def _begun(project: str, name: str, folder: Path, config: Mapping[str, Any], run_id: str, offline: bool) -> Any:
    import wandb

    run = wandb.init(
        project=project,
        name=name,
        id=run_id,
        resume="allow",
        dir=str(folder),
        config=dict(config),
        mode="offline" if offline else None,  # else as WANDB_MODE says
        settings=wandb.Settings(finish_timeout=_FINISH_TIMEOUT_S, init_timeout=_INIT_TIMEOUT_S),
        allow_val_change=True,  # a run that goes on may have other pools, say
    )
    run.define_metric(_STEP, hidden=True)
    run.define_metric("*", step_metric=_STEP)
    return run
