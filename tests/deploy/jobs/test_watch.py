"""A log is written once and whole, however often the connection breaks; a silent head is given up."""

import asyncio
import time
from collections.abc import Iterator
from threading import Timer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import RunError
from deploy.jobs import head as head_module
from deploy.jobs import watch
from deploy.jobs.head import Head
from deploy.jobs.watch import Log, follow
from tests.deploy.jobs.fake_head import FakeHead, fake_head

TEXT = "".join(f"my-run  {step}/100  reward 0.{step}\n" for step in range(100)) + "ünïcode at the end\n"


@pytest.fixture
def fake() -> Iterator[FakeHead]:
    with fake_head() as head:
        yield head


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_ASK_EVERY_S", 0.1)
    monkeypatch.setattr(watch, "_REST_S", 2.0)


@given(st.text(max_size=60), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=8))
def test_each_character_is_written_once_whatever_is_sent_again(text: str, pieces: list[tuple[int, int]]) -> None:
    written: list[str] = []
    log = Log(written.append)
    for begin, size in pieces:
        begin = min(begin, sum(map(len, written)))  # a log has no holes
        log.take(begin, text[begin : begin + size])
    log.take(0, text)
    assert "".join(written) == text


def end(fake: FakeHead, after_s: float, **more: object) -> None:
    Timer(after_s, lambda: fake.jobs["a"].update(more)).start()


@pytest.mark.parametrize("cut_after", [[], [1, 50, 51, 900], [0, 0]])
def test_a_log_is_whole_through_broken_connections(fake: FakeHead, cut_after: list[int]) -> None:
    fake.job("a", "RUNNING")
    fake.logs["a"], fake.cut_after = TEXT, list(cut_after)
    end(fake, 1.0, status="FAILED", driver_exit_code=75)
    written: list[str] = []
    ended = asyncio.run(follow(Head(fake.address), "a", written.append))
    assert "".join(written) == TEXT
    assert ended.exit_code == 75
    assert sum("tail" in request for request in fake.requests) >= min(len(cut_after), 2) + 1


def test_a_connection_that_is_lost_without_a_word_is_made_again(
    fake: FakeHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_QUIET_S", 0.3)
    fake.job("a", "RUNNING")
    fake.logs["a"], fake.lost_tails = TEXT, 1
    end(fake, 2.0, status="SUCCEEDED")
    before_the_end: list[str] = []
    written: list[str] = []
    Timer(1.8, lambda: before_the_end.extend(written)).start()
    assert asyncio.run(follow(Head(fake.address), "a", written.append)).exit_code == 0
    assert "".join(before_the_end) == "".join(written) == TEXT


def test_a_head_that_is_silent_is_given_up_in_time_and_one_that_comes_back_is_not(
    fake: FakeHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.job("a", "RUNNING")
    head = Head(fake.address)
    monkeypatch.setattr(head_module, "_ANSWER_S", 0.3)
    fake.silent = True
    Timer(0.8, lambda: setattr(fake, "silent", False)).start()
    end(fake, 1.2, status="SUCCEEDED")
    assert asyncio.run(follow(head, "a", str, silence_s=5.0)).exit_code == 0
    fake.job("a", "RUNNING")
    fake.silent = True
    began = time.monotonic()
    with pytest.raises(RunError, match="silent for 1 s, and a may go on"):
        asyncio.run(follow(head, "a", str, silence_s=1.0))
    assert time.monotonic() - began < 4.0


def test_a_job_that_the_head_forgot_is_told(fake: FakeHead) -> None:
    with pytest.raises(RunError, match=r"no longer knows a\.2.*the same submit command goes on"):
        asyncio.run(follow(Head(fake.address), "a.2", str))
