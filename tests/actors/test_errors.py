"""What Ray says of a dead worker is told in one sentence, with the machine's name when that is what has died."""

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError

from actors.errors import RunError, StoppedError, last_line

NODE = "8f" * 28
DIED = f"The actor died because its node has died. Node Id: {NODE}"
REASON = "\n\tthe actor's node was terminated unexpectedly: health check failed due to missing too many heartbeats"

KILLED = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: 5f) was "
    "61.20GB used / 64.00GB limit (0.956250), which exceeds the threshold\nTop 10 memory users:\nPID MEM(GB) COMMAND\n"
    "12 40.10 ray::Policy"
)
TOLD = "give the machine more memory or fewer workers (`python -m deploy plan` tells what a node's workers hold)"


def died(message: str, ip: str = "10.0.0.7") -> ActorDiedError:
    context = ActorDiedErrorContext(
        error_message=message, node_ip_address=ip, pid=12, class_name="LightRollout", actor_id=b"\2" * 16
    )
    return ActorDiedError(context)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (died(DIED + REASON), "its machine, 10.0.0.7, has died (Ray's node 8f8f8f8f)"),
        (died(DIED, ip=""), "its machine has died (Ray's node 8f8f8f8f)"),
        (
            ActorUnavailableError(DIED + REASON, b"\2" * 16),
            "its machine has died (Ray's node 8f8f8f8f)",
        ),
        (died("Worker unexpectedly exits with a connection error code 2."), "Worker unexpectedly exits with a "
         "connection error code 2."),
        (OutOfMemoryError(KILLED), "killed for want of memory on machine 10.0.0.7, where 61.20 of 64.00 GB were "
         f"taken: {TOLD}"),
        (OutOfMemoryError("Task was killed due to the node running low on memory."), "killed for want of memory: "
         f"{TOLD}"),
        (RunError("one\ntwo"), "two"),
        (RunError(""), "RunError"),
    ],
)  # fmt: skip
def test_one_sentence_says_what_went_wrong(error: Exception, told: str) -> None:
    assert last_line(error) == told


@pytest.mark.parametrize(
    ("newest", "expected"),
    [
        (7, "stopped after 7 of 9 steps; the same command goes on"),
        (4, "stopped after 7 of 9 steps; the same command goes on from step 4"),
        (None, "stopped after 7 of 9 steps; there is no checkpoint: the same command begins anew"),
    ],
)
def test_who_stops_a_run_is_told_where_it_goes_on(newest: int | None, expected: str) -> None:
    assert str(StoppedError.after(7, 9, newest)) == expected
    assert str(StoppedError.after(7, 9, newest, "kl was 3")) == expected.replace("steps;", "steps: kl was 3;")
