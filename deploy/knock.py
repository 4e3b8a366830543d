"""Whether a cluster's head lets us in is asked in one call, before Ray tries: of a token that is wrong or missing Ray
says many lines, and at last no more than that it failed to connect."""

from typing import Any

_TIMEOUT_S = 5.0


def turned_away(gcs_address: str) -> bool:
    """Whether the head at host:port refuses the token that is set here, or that none is; False where it says anything
    else, or nothing: then Ray will."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
    from ray.exceptions import RayError

    words: Any = gcs_service_pb2
    try:
        # Ray's options: no proxy stands between the nodes of a cluster, and none is shown the token.
        with init_grpc_channel(gcs_address, options=GLOBAL_GRPC_OPTIONS) as channel:
            head = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            head.GetClusterId(words.GetClusterIdRequest(), timeout=_TIMEOUT_S)
    except grpc.RpcError as error:
        return bool(error.code() is grpc.StatusCode.UNAUTHENTICATED)
    except (RayError, RuntimeError, OSError):  # a token that is not to be had, or no certificates; Ray says which
        return False
    return False


def head_of(address: str) -> str | None:
    """The host:port at which the head of the cluster at a Ray address listens; None where Ray alone finds it."""
    from ray._private.services import canonicalize_bootstrap_address

    if address.startswith("ray://"):
        return None
    if address.rpartition(":")[2].isdecimal():
        return address
    try:
        return canonicalize_bootstrap_address(address)
    except (OSError, ValueError):  # Ray says why
        return None
