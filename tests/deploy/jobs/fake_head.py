"""A head's job server without a cluster: what Ray's client says and hears, and faults that a real head seldom has."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from aiohttp import WSCloseCode, web

NODE = {
    "node_id": "a" * 56,
    "node_ip": "10.0.0.1",
    "node_name": "10.0.0.1",
    "is_head_node": True,
    "state": "ALIVE",
    "state_message": None,
    "resources_total": {"CPU": 16.0, "memory": 15501399245.0, "node:10.0.0.1": 1.0},
    "labels": {},
}


@dataclass
class FakeHead:
    """What it knows, what it was asked, and how it misbehaves."""

    address: str = ""
    ray_version: str = ray.__version__
    nodes: list[dict[str, Any]] = field(default_factory=lambda: [dict(NODE)])
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    packages: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    cut_after: list[int] = field(default_factory=list)
    """How many characters of a log are sent before the connection breaks, one time after another."""
    lost_tails: int = 0
    """Logs that are asked for, and of which nothing ever comes."""
    then: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What becomes of a job when its log has been sent whole."""
    silent: bool = False
    """Whether it takes connections and answers nothing."""
    refusal: str | None = None
    """What the answer to every submission is, with the status 500."""
    someone_else: dict[str, Any] | None = None
    """A job that is there just before ours would be."""
    lost_answers: int = 0
    """Submissions that are carried out and not answered."""

    def job(self, job: str, status: str, **more: Any) -> None:
        """There is such a job."""
        self.jobs[job] = {"type": "SUBMISSION", "submission_id": job, "status": status, "entrypoint": ""} | more

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": self.ray_version, "ray_commit": "x"})

    async def list_nodes(self, request: web.Request) -> web.Response:
        found = {"total": len(self.nodes), "num_after_truncation": len(self.nodes), "num_filtered": len(self.nodes)}
        result = found | {"result": self.nodes, "partial_failure_warning": "", "warnings": None}
        return web.json_response({"result": True, "msg": "", "data": {"result": result}})

    async def list_jobs(self, request: web.Request) -> web.Response:
        return web.json_response(list(self.jobs.values()))

    async def get_package(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if request.match_info["name"] in self.packages else 404)

    async def put_package(self, request: web.Request) -> web.Response:
        self.packages[request.match_info["name"]] = await request.read()
        return web.Response()

    async def submit(self, request: web.Request) -> web.Response:
        told = await request.json()
        job = told["submission_id"]
        if self.refusal is not None:
            return web.Response(status=500, text=self.refusal)
        if self.someone_else is not None:
            self.jobs[job], self.someone_else = self.someone_else | {"submission_id": job}, None
        if job in self.jobs:
            return web.Response(status=400, text=f"Traceback\nValueError: Job with submission_id {job} already exists.")
        self.job(job, "RUNNING", start_time=1_000, **{k: v for k, v in told.items() if k != "submission_id"})
        if self.lost_answers:
            self.lost_answers -= 1
            assert request.transport is not None
            request.transport.close()
        return web.json_response({"job_id": job, "submission_id": job})

    async def one(self, request: web.Request) -> web.Response:
        job = request.match_info["job"]
        if job not in self.jobs:
            return web.Response(status=404, text=f"Job {job} does not exist")
        return web.json_response(self.jobs[job])

    async def stop(self, request: web.Request) -> web.Response:
        job = self.jobs[request.match_info["job"]]
        begun = job["status"] != "PENDING"
        job["status"] = "STOPPED" if begun else "RUNNING"
        return web.json_response({"stopped": begun})

    async def log(self, request: web.Request) -> web.Response:
        return web.json_response({"logs": self.logs.get(request.match_info["job"], "")})

    async def tail(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        job, sent = request.match_info["job"], 0
        cut = self.cut_after.pop(0) if self.cut_after else None
        if self.lost_tails:
            self.lost_tails -= 1
            await asyncio.sleep(60)
        while True:
            text = self.logs.get(job, "")[:cut]
            if text[sent:]:
                await socket.send_str(text[sent:])
                sent = len(text)
            if cut is None and sent == len(self.logs.get(job, "")):
                self.jobs[job].update(self.then.get(job, {}))
            if cut is not None and sent >= cut:
                assert request.transport is not None
                request.transport.abort()
                return socket
            if self.jobs[job]["status"] not in ("PENDING", "RUNNING"):
                await socket.close(code=WSCloseCode.OK)
                return socket
            await asyncio.sleep(0.05)

    def app(self, token: str | None) -> web.Application:
        @web.middleware
        async def door(request: web.Request, handler: Any) -> web.StreamResponse:
            self.requests.append(f"{request.method} {request.path}")
            while self.silent:  # noqa: ASYNC110  another thread ends it
                await asyncio.sleep(0.05)
            shown = request.headers.get("Authorization")
            if token is not None and shown is None:
                return web.Response(status=401, text="Unauthorized: Missing authentication token")
            if token is not None and shown != f"Bearer {token}":
                return web.Response(status=403, text="Forbidden: Invalid authentication token")
            return await handler(request)

        app = web.Application(middlewares=[door], client_max_size=2**30)
        app.router.add_get("/api/version", self.version)
        app.router.add_get("/api/v0/nodes", self.list_nodes)
        app.router.add_get("/api/jobs/", self.list_jobs)
        app.router.add_post("/api/jobs/", self.submit)
        app.router.add_get("/api/jobs/{job}", self.one)
        app.router.add_get("/api/jobs/{job}/logs", self.log)
        app.router.add_get("/api/jobs/{job}/logs/tail", self.tail)
        app.router.add_post("/api/jobs/{job}/stop", self.stop)
        app.router.add_get("/api/packages/{protocol}/{name}", self.get_package)
        app.router.add_put("/api/packages/{protocol}/{name}", self.put_package)
        return app


@contextlib.contextmanager
def fake_head(token: str | None = None) -> Iterator[FakeHead]:
    """One that listens on this machine until the end of the block."""
    head, loop, up = FakeHead(), asyncio.new_event_loop(), threading.Event()

    async def serve() -> web.AppRunner:
        runner = web.AppRunner(head.app(token), shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        head.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    runners: list[web.AppRunner] = []

    def run() -> None:
        asyncio.set_event_loop(loop)
        runners.append(loop.run_until_complete(serve()))
        up.set()
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert up.wait(10)
    try:
        yield head
    finally:
        head.silent = False
        asyncio.run_coroutine_threadsafe(runners[0].cleanup(), loop).result(timeout=10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=10)
