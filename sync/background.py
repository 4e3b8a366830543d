"""Work behind the scenes takes the time that is left: the wire goes before it, and so does an engine that generates."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

_NICENESS = 10


def background(name: str) -> ThreadPoolExecutor:
    """One thread that runs its tasks in order, behind the other threads of this machine."""
    return ThreadPoolExecutor(1, thread_name_prefix=f"weights-{name}", initializer=_step_back)


def _step_back() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)  # on Linux: of this thread alone
