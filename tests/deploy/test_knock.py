"""Who is not let in by a head is told so by its first answer; who is, or gets another answer, is left to Ray."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from deploy.knock import head_of, turned_away
from deploy.session import ClusterError, refusals

CODES = grpc.StatusCode


class Head(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
    """Answers with a code."""

    def __init__(self) -> None:
        self.code = CODES.OK

    def GetClusterId(self, request: Any, context: grpc.ServicerContext) -> Any:
        if self.code is not CODES.OK:
            context.abort(self.code, "no")
        reply: Any = gcs_service_pb2
        return reply.GetClusterIdReply()


@pytest.fixture
def head() -> Iterator[tuple[Head, str]]:
    served, server = Head(), grpc.server(ThreadPoolExecutor(1))
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(served, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield served, f"127.0.0.1:{port}"
    server.stop(None).wait(10.0)


@pytest.mark.parametrize(
    ("code", "expected"),
    [(CODES.UNAUTHENTICATED, True), (CODES.OK, False), (CODES.ABORTED, False), (CODES.UNIMPLEMENTED, False)],
    ids=lambda value: str(value),
)
def test_only_a_head_that_says_so_turns_us_away(head: tuple[Head, str], code: grpc.StatusCode, expected: bool) -> None:
    served, address = head
    served.code = code
    assert turned_away(address) == expected


def test_it_is_said_before_ray_tries(head: tuple[Head, str], monkeypatch: pytest.MonkeyPatch) -> None:
    served, address = head
    served.code = CODES.UNAUTHENTICATED
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ClusterError, match="asks for a token, and none is set here; set RAY_AUTH"), refusals(address):
        pytest.fail("Ray would try")


@pytest.mark.parametrize("kept_in", [None, "no-such-file", "empty"])
def test_a_token_that_is_not_to_be_had_is_left_to_ray(
    head: tuple[Head, str], kept_in: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    if kept_in is not None:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / kept_in))
    assert not turned_away(head[1])


def test_no_proxy_is_shown_the_token(head: tuple[Head, str], monkeypatch: pytest.MonkeyPatch) -> None:
    served, address = head
    served.code = CODES.UNAUTHENTICATED
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert turned_away(address)


def test_where_ray_alone_finds_the_head_nobody_is_asked() -> None:
    assert head_of("ray://127.0.0.1:10001") is None
    assert head_of("10.0.0.1:6379") == "10.0.0.1:6379"
    assert head_of("nonsense") is None
