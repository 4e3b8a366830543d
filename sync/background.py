"""Work behind the scenes never stands in the way of what it runs beside: the wire, and the engine that generates."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

NICENESS = int(os.environ.get("NICE", "10"))


def background(name: str) -> ThreadPoolExecutor:
    """One thread that runs its tasks in order, with the time that other threads leave it.

    On a full machine a digest would otherwise keep a wire's thread from its core, and the other end of the wire waits.
    """
    return ThreadPoolExecutor(1, thread_name_prefix=f"weights-{name}", initializer=_step_back)


def _step_back() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)  # on Linux: of this thread alone
