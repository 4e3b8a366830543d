"""An address that takes no jobs is refused with the fix."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.jobs.address import checked_address, take_address
from deploy.session import show_token


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("ray://head:10001", "Ray's own client"),
        ("auto", "no http:// or https:// address"),
        ("head:6379", "no http:// or https:// address"),
        ("10.0.0.1:8265", "no http:// or https:// address"),
        ("http://", "no http:// or https:// address"),
        ("http://head", "port is missing"),
        ("http://head:eight", "no address"),
        ("http://head:99999", "no address"),
        ("http://[::1:8265", "no address"),
        ("http://me:s3cret@head:8265", "name or password"),
        ("http://head:8265?token=s3cret", "no http:// or https:// address"),
        ("", "no http:// or https:// address"),
    ],
)
def test_a_bad_address_is_refused(address: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        checked_address(address)
    assert "--address" in str(refused.value)


@pytest.mark.parametrize("address", ["http://head:8265", "https://ray.example.org/team", "http://[::1]:8265/"])
def test_a_dashboards_address_is_taken(address: str) -> None:
    assert checked_address(address) == address.rstrip("/")


pieces = st.sampled_from(
    ["http", "https", "ray", "://", ":", "/", "@", "[", "]", "::1", "head", "8265", "?", "#", "%", "\n", " "]
)


@given(st.one_of(st.text(), st.lists(pieces, max_size=8).map("".join)))
def test_whatever_is_written_is_an_address_or_a_value_error(address: str) -> None:
    with suppress(ValueError):
        assert checked_address(address).startswith(("http", "HTTP", "Http"))


def test_what_is_given_goes_before_the_environment_which_ray_would_prefer() -> None:
    env = {"RAY_ADDRESS": "ray://other:10001", "RAY_API_SERVER_ADDRESS": "http://other:1"}
    assert take_address("http://head:8265", env) == "http://head:8265"
    assert env == {}
    assert take_address(None, {"RAY_ADDRESS": "http://b:2", "RAY_API_SERVER_ADDRESS": "http://a:1"}) == "http://a:1"
    with pytest.raises(ValueError, match="which cluster"):
        take_address(None, {})


def test_a_token_that_is_set_is_shown_unless_the_user_says_otherwise() -> None:
    for env in ({"RAY_AUTH_TOKEN": "t"}, {"RAY_AUTH_TOKEN_PATH": "/t"}):
        show_token(env)
        assert env["RAY_AUTH_MODE"] == "token"
    off, none = {"RAY_AUTH_TOKEN": "t", "RAY_AUTH_MODE": "disabled"}, dict[str, str]()
    show_token(off)
    show_token(none)
    assert (off["RAY_AUTH_MODE"], none) == ("disabled", {})
