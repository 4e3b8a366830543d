"""Where a cluster takes jobs: the HTTP address of its dashboard, which is told from Ray's other ports."""

from collections.abc import MutableMapping
from urllib.parse import urlsplit

_VARIABLES = "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"
_FIX = "give the address of the cluster's dashboard, such as --address http://HEAD:8265"


def take_address(given: str | None, env: MutableMapping[str, str]) -> str:
    """The address that is given, or else the environment's; ValueError says what it must be.

    Ray lets its variables overrule what its client is told, so they leave the environment.
    """
    told = [value for value in (env.pop(name, None) for name in _VARIABLES) if value]
    if given is None and not told:
        raise ValueError(f"--address: which cluster? {_FIX}")
    return checked_address(told[0] if given is None else given)


def checked_address(address: str) -> str:
    """The address without a slash at its end, or a ValueError."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"--address: {address!r} is no address ({error}); {_FIX}") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"--address: a name or password in an address would be printed and logged; {_FIX}")
    if parts.scheme == "ray":
        raise ValueError(f"--address {address}: this is the port of Ray's own client, which takes no jobs; {_FIX}")
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise ValueError(f"--address: {address!r} is no http:// or https:// address; {_FIX}")
    if port is None and parts.scheme == "http":
        raise ValueError(f"--address {address}: the port is missing; Ray's dashboard has 8265 unless it was set")
    return address.rstrip("/")
