"""What stops a run and can be said in one sentence; the command line prints the sentence and exits with 1."""

import re

_DEAD_NODE = re.compile(r"\bnode has died\. Node Id: (\w+)")
_ADDRESS = re.compile(r"^\s*ip: (\S+)$", re.MULTILINE)
_NO_MEMORY = re.compile(r"\bkilled due to the node running low on memory\b")
_SHORT_NODE = re.compile(r"\(IP: ([^\s,)]+)[^)]*\) was ([\d.]+) ?GB(?: used)? / ([\d.]+) ?GB")


class RunError(RuntimeError):
    """The run cannot go on; the message names the suspect."""


class ReplicaDeadError(RunError):
    """A rollout replica's engine is gone."""


class PolicyLostError(RunError):
    """A policy rank is dead, wedged or broken: all ranks must be built again, and go on from a cut."""


class SpoiledError(RunError):
    """The policy holds numbers that are not finite: no run can go on from a cut of it."""


class StoppedError(RunError):
    """The run was asked to stop; the same command goes on from the newest cut, or begins anew where there is none."""

    @classmethod
    def after(cls, step: int, num_steps: int, newest: int | None, why: str | None = None) -> "StoppedError":
        """`newest`: the version of the newest cut; None when there is none."""
        begins = "the same command goes on" + ("" if newest == step else f" from step {newest}")
        begins = "there is no checkpoint: the same command begins anew" if newest is None else begins
        return cls(f"stopped after {step} of {num_steps} steps{f': {why}' if why else ''}; {begins}")


class RollBackError(RunError):
    """The run has gone wrong since a while: it is to go back to the last good cut, and on from there."""


def first_cause(error: BaseException) -> BaseException:
    """The first error of nested groups: the one that stopped the others."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def last_line(error: BaseException) -> str:
    """What went wrong, without the remote traceback that Ray puts before it.

    Of a worker whose machine is gone Ray tells where it was further up, and last why it has given the machine up. Of
    one that was killed to save its machine Ray tells last who else took memory there.
    """
    if _NO_MEMORY.search(str(error)) is not None:
        return _killed_for_memory(str(error))
    node, address = _DEAD_NODE.search(str(error)), _ADDRESS.search(str(error))
    if node is not None:
        where = "its machine" if address is None else f"its machine, {address[1]},"
        return f"{where} has died (Ray's node {node[1][:8]})"
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _killed_for_memory(told: str) -> str:
    short = _SHORT_NODE.search(told)
    where = "" if short is None else f" on machine {short[1]}, where {short[2]} of {short[3]} GB were taken"
    return (
        f"killed for want of memory{where}: give the machine more memory or fewer workers "
        "(`python -m deploy plan` tells what a node's workers hold)"
    )
