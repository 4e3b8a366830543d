"""The journal as a file: append-only lines of JSON, of which a process that is killed can tear the last one only.

When a run goes on from a checkpoint, what was written since that cut happened to weights that are gone. It stays in the
file, and the line `resumed` says from which line on it does not count.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from actors.fates import Event, Fates


def read(path: Path) -> list[Event]:
    """Every line; a torn last one was never written. ValueError names a line that is none of ours."""
    lines = path.read_bytes().split(b"\n")
    events: list[Event] = []
    for number, line in enumerate(lines[:-1], start=1):  # behind the last line end is nothing, or what was torn
        try:
            event = json.loads(line)
            complete = {"event", "ordinal", "t"} <= event.keys() and type(event["ordinal"]) is int
        except (ValueError, AttributeError, RecursionError):
            complete = False
        if not complete:
            raise ValueError(f"{path}: line {number} is not an event of a journal")
        events.append(event)
    return events


def check(path: Path, lines: int) -> None:
    """The journal holds the `lines` lines that a cut counts on; ValueError when it does not."""
    if not path.is_file():
        raise ValueError(f"{path}: is gone, and without it nobody knows what was trained; begin anew with --overwrite")
    events = read(path)
    try:
        fates(events)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; put the whole file back, or begin anew with --overwrite") from error
    found = len(events)
    if found < lines:
        raise ValueError(
            f"{path}: has {found} lines where the checkpoint counts on {lines}: somebody has cut it off; put the whole "
            "file back, or begin anew with --overwrite"
        )


def mend(path: Path) -> None:
    """Cut off a torn last line, so that the next one begins at its beginning."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)


def fates(events: Iterable[Event]) -> Fates:
    """What counts of a journal; work that was undone by going back to a cut is waste, cause `rolled back`."""
    standing: list[tuple[int, Event]] = []
    undone: list[Event] = []
    num_cuts = num_roll_backs = 0
    event: Event = {}
    try:
        for number, event in enumerate(events):
            if event["event"] == "resumed":
                undone += [past for line, past in standing if line >= event["lines"] and past["event"] == "scored"]
                standing = [(line, past) for line, past in standing if line < event["lines"]] + [(number, event)]
                num_cuts += 1
            elif event["event"] == "rolled back":  # whatever was undone, that it was is not
                num_roll_backs += 1
            else:
                standing.append((number, event))
        result = Fates(num_cuts=num_cuts, num_roll_backs=num_roll_backs)
        for _, event in standing:
            result.apply(event)
        for event in undone:
            result.wasted("rolled back", sum(event["lengths"]), event["generate_s"])
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"a journal has no such event: {event} ({type(error).__name__}: {error})") from error
    return result
