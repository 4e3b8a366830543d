"""`python -m deploy.drain`: the runs driven from this container stop with a checkpoint, or the time is over.

Kubernetes runs it before it ends the head's pod: that would end Ray's processes, and not tell the run.
"""

import argparse
from collections.abc import Iterable, Sequence

import psutil


def is_driver(argv: Sequence[str]) -> bool:
    """Whether this is the command line of a run's own process, not of a shell around it."""
    return list(argv[1:4]) == ["-m", "deploy", "train"]


def drivers() -> list[psutil.Process]:
    """The runs of this container, which sees no process but its own."""
    return [process for process in psutil.process_iter(["cmdline"]) if is_driver(process.info["cmdline"] or [])]


def drain(processes: Iterable[psutil.Process], within_s: float) -> int:
    """Ask each to stop, wait, and say how many still run when the time is over."""
    asked = []
    for process in processes:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue
        asked.append(process)
    _, running = psutil.wait_procs(asked, timeout=within_s)
    return len(running)


def main() -> None:
    """Exit code 1 when a run did not stop in time."""
    parser = argparse.ArgumentParser(prog="python -m deploy.drain", description=__doc__)
    parser.add_argument("--within-s", type=float, required=True)
    raise SystemExit(min(1, drain(drivers(), parser.parse_args().within_s)))


if __name__ == "__main__":
    main()
