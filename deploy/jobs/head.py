"""The head of a cluster, asked through Ray's own client: every request has a deadline, every refusal is a sentence."""

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from deploy.jobs.attempts import Attempt, job_id, parse_id
from deploy.jobs.variables import STOP_WAIT
from placement.cluster import ClusterSpec, from_ray

_ANSWER_S = 30.0
_SEND_S = 120.0
"""The cluster stores what it is sent before it answers."""
_AGENT_S = 60.0
"""A head that has just started takes no jobs yet."""
_RETRY_S = 2.0
_MOST_NODES = 10_000
RUN_DIR = "paceline_run_dir"
"""Metadata by which a job is known to be ours."""
_RAYS_DEFAULT_WAIT_S = 3.0


class HeadError(ValueError):
    """The cluster cannot be used as it is, or as it was named."""


class NoAnswerError(HeadError):
    """Nobody answered; the next time somebody may."""


class TakenError(HeadError):
    """Another has submitted this attempt."""


class GoneError(HeadError):
    """The cluster knows no such job."""


class _Client(JobSubmissionClient):
    """Ray's client, which by itself would wait for ever."""

    def _do_request(self, method: str, endpoint: str, **rest: Any) -> requests.Response:
        seconds = _ANSWER_S if method == "GET" else _SEND_S
        return super()._do_request(method, endpoint, **({"timeout": seconds} | rest))


class Head:
    """One cluster's job server."""

    def __init__(self, address: str) -> None:
        """Joins nothing and starts nothing; HeadError when it is no Ray, another Ray, or does not let us in."""
        self.address = address
        for name in ("dashboard_sdk", "modules.dashboard_sdk", "modules.job.sdk"):
            logging.getLogger(f"ray.dashboard.{name}").setLevel(logging.ERROR)
        logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.ERROR)
        with _told(address):
            try:
                self._client = _Client(address)
                theirs = self._client._do_request("GET", "/api/version").json()["ray_version"]
            except (KeyError, TypeError, RuntimeError, requests.JSONDecodeError):
                raise HeadError(f"--address {address}: what answers there is not Ray's dashboard") from None
        if theirs != ray.__version__:
            raise HeadError(
                f"--address {address}: the cluster runs Ray {theirs}, and this is {ray.__version__}; install the same "
                "versions on the nodes and here (deploy/requirements)"
            )

    def attempts(self) -> list[Attempt]:
        """All jobs that have a run's id."""
        with _told(self.address):
            found = [attempt_of(details) for details in self._client.list_jobs()]
        return [each for each in found if each is not None]

    def attempt(self, job: str) -> Attempt:
        """One of them, as it is now."""
        with _told(self.address):
            found = attempt_of(self._client.get_job_info(job))
        assert found is not None, f"{job} is the id of a run"
        return found

    def cluster(self) -> ClusterSpec:
        """The nodes that are alive; HeadError when there are none for a minute."""
        deadline = time.monotonic() + _AGENT_S
        while True:
            try:
                nodes = list_nodes(self.address, limit=_MOST_NODES, timeout=int(_ANSWER_S), detail=True)
            except (RayStateApiException, requests.RequestException, ConnectionError) as error:
                raise NoAnswerError(f"--address {self.address}: its nodes are not told: {_first_line(error)}") from None
            alive = [node for node in nodes if node["state"] == "ALIVE"]
            if alive or time.monotonic() > deadline:
                break
            time.sleep(1.0)
        if not alive:
            raise HeadError(f"--address {self.address}: the cluster has no node")
        return from_ray([_as_ray_tells(node) for node in alive])

    def submit(self, run: str, number: int, command: str, run_dir: str, archive: Path, env: dict[str, str]) -> str:
        """Send the archive and start the attempt; TakenError when somebody was quicker, or it was us unheard."""
        job = job_id(run, number)
        deadline = time.monotonic() + _AGENT_S
        while True:
            with _told(self.address):
                try:
                    return self._client.submit_job(
                        entrypoint=command,
                        submission_id=job,
                        runtime_env={"working_dir": str(archive), "env_vars": env},
                        metadata={RUN_DIR: run_dir},
                    )
                except RuntimeError as error:
                    if "already exists" in str(error):
                        raise TakenError(f"{job} has been submitted already") from None
                    if "No available agent" not in str(error) or time.monotonic() > deadline:
                        raise HeadError(f"--address {self.address}: the job was refused: {_reason(error)}") from None
                except (requests.RequestException, ConnectionError):
                    # It may have been taken all the same; then the same id is refused, and nothing runs twice.
                    if time.monotonic() > deadline:
                        raise
            time.sleep(_RETRY_S)

    def stop(self, job: str) -> bool:
        """Ask a job to stop; False when it has not started yet, or is over."""
        with _told(self.address):
            return self._client.stop_job(job)

    def log(self, job: str) -> str:
        """All that a job has printed."""
        with _told(self.address):
            return self._client.get_job_logs(job)

    def tail(self, job: str) -> AsyncIterator[str]:
        """What a job has printed and prints, from the beginning, until it ends."""
        return self._client.tail_job_logs(job)


def attempt_of(details: JobDetails) -> Attempt | None:
    """What a job is to us; None for jobs whose id no run has, and for drivers that were not submitted."""
    parsed = parse_id(details.submission_id or "")
    if parsed is None:
        return None
    metadata, env = details.metadata or {}, (details.runtime_env or {}).get("env_vars") or {}
    return Attempt(
        run=parsed[0],
        number=parsed[1],
        state=str(details.status.value),
        command=details.entrypoint,
        ours=RUN_DIR in metadata,
        run_dir=metadata.get(RUN_DIR),
        stop_wait_s=float(env.get(STOP_WAIT, _RAYS_DEFAULT_WAIT_S)),
        began_s=details.start_time and details.start_time / 1000,
        ended_s=details.end_time and details.end_time / 1000,
        driver_exit_code=details.driver_exit_code,
        message=details.message or "",
    )


def _as_ray_tells(node: Any) -> dict[str, Any]:
    """A node of the dashboard in the form of `ray.nodes()`."""
    return {
        "Alive": True,
        "NodeManagerHostname": node["node_name"],
        "NodeID": node["node_id"],
        "Resources": node["resources_total"],
        "Labels": node["labels"],
    }


@contextlib.contextmanager
def _told(address: str) -> Iterator[None]:
    """What Ray's client and the network raise, as sentences."""
    where = f"--address {address}"
    try:
        yield
    except AuthenticationError as error:
        raise HeadError(f"{where}: {_about_token(str(error))} (SECURITY.md says how tokens are set)") from None
    except (requests.Timeout, TimeoutError):
        raise NoAnswerError(f"{where}: there was no answer in {_ANSWER_S:g} s") from None
    except (requests.RequestException, ConnectionError) as error:
        raise NoAnswerError(
            f"{where}: nobody answers as Ray's dashboard does ({_first_line(error)}); is it the head, and the port of "
            "its dashboard, 8265 by default? From another machine it must be started with --dashboard-host"
        ) from None
    except RuntimeError as error:  # the server's own, told by its status
        if "does not exist" in str(error):
            raise GoneError(f"{where}: {_reason(error)}") from None
        raise NoAnswerError(f"{where}: {_reason(error)}") from None


def _about_token(said: str) -> str:
    if "Forbidden" in said:
        return "the cluster does not take this token; export the one that its nodes have, RAY_AUTH_TOKEN_PATH=FILE"
    if "Unauthorized" in said:
        return "the cluster asks for a token, and none is set here; export RAY_AUTH_TOKEN_PATH=FILE"
    return f"{said.split('. Ensure')[0].rstrip('.')}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _reason(error: RuntimeError) -> str:
    """The last line of the server's traceback."""
    lines = [line for line in str(error).splitlines() if line.strip(" .")]
    return lines[-1].strip() if lines else type(error).__name__
