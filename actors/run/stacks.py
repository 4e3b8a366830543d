"""What the processes of a node do at this moment: their states, and their Python stacks, without stopping them.

And what this very process does, which nobody needs the right to trace for.
"""

import asyncio
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

from actors.run.suspect import Process

_DUMP_TIMEOUT_S = 5.0


def processes_of(pids: list[int], timeout_s: float) -> dict[int, tuple[Process, ...]]:
    """Each process with all that it has started, its own first; those that come too late say so."""
    import psutil

    deadline = time.monotonic() + timeout_s
    found: dict[int, tuple[Process, ...]] = {}
    for pid in pids:
        try:
            own = psutil.Process(pid)
            family = [own, *own.children(recursive=True)]
        except psutil.Error:
            found[pid] = ()
            continue
        found[pid] = tuple(_seen(process.pid, deadline) for process in family)
    return found


def _seen(pid: int, deadline: float) -> Process:
    left_s = min(_DUMP_TIMEOUT_S, deadline - time.monotonic())
    stack = _stack(pid, left_s) if left_s > 0 else "no stack: there was no time left to look at this process"
    return Process(pid, _command(pid), _state(pid), stack)


def _stack(pid: int, timeout_s: float) -> str:
    """py-spy's dump. It reads the memory of the process, which goes on, or stays stopped, meanwhile."""
    spy = Path(sys.executable).with_name("py-spy")
    command = [str(spy), "dump", "--nonblocking", "--full-filenames", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except FileNotFoundError:
        return f"no stack: {spy} is not installed on this node"
    except subprocess.TimeoutExpired:
        return f"no stack: py-spy took longer than {timeout_s:.0f} s"
    if done.returncode != 0:
        # Without the right to trace (containers without SYS_PTRACE, another user's process) there is none to be had.
        return f"no stack: py-spy: {(done.stderr.strip().splitlines() or ['failed'])[0]}"
    return done.stdout.partition("\n")[2].rstrip()  # without the command line, which is told once


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _command(pid: int) -> str:
    """Without its arguments beyond the first few words: they may be anything."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "?"
    return " ".join(words[:3]).strip()[:120]


def stacks_here() -> str:
    """The Python stack of each thread of this process."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = [(names.get(ident, "?"), traceback.format_stack(frame)) for ident, frame in sys._current_frames().items()]
    return "\n".join(f"Thread {name}\n{''.join(stack)}" for name, stack in stacks).rstrip()


def tasks_here() -> str:
    """What each task of the running event loop waits for: the line where it stands."""
    lines = []
    for task in asyncio.all_tasks():
        frames = task.get_stack(limit=1)
        at = f"{frames[-1].f_code.co_filename}:{frames[-1].f_lineno}" if frames else "not begun, or over"
        lines.append(f"{task.get_name()}: {getattr(task.get_coro(), '__qualname__', '?')} ({at})")
    return "\n".join(sorted(lines))
