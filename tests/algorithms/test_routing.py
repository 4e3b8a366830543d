"""A group goes to the replica with the fewest outstanding tokens that has room, and to one that is avoided last."""

from hypothesis import given
from hypothesis import strategies as st

from algorithms.routing import Router


def router(num_replicas: int, most: int | None = None) -> Router:
    routes = Router(most)
    for replica in range(num_replicas):
        routes.join(replica)
    return routes


def test_one_that_is_avoided_gets_nothing_while_another_is_there() -> None:
    routes = router(2, most=2)
    assert [routes.assign(10, {0}) for _ in range(3)] == [1, 1, None], "it waits until the other one has room"
    assert [routes.assign(10) for _ in range(3)] == [0, 0, None]
    routes.done(0, 10)
    assert routes.assign(10, {0}) is None
    assert routes.assign(10) == 0, "it lost nothing by having been avoided"


def test_who_avoids_all_that_are_there_avoids_nobody() -> None:
    routes = router(3)
    assert routes.assign(10, {0, 1, 2, 7}) == 0
    routes.leave(2)
    assert [routes.assign(10, {0, 1}), routes.assign(10, {1})] == [1, 0]
    routes.leave(0)
    assert routes.assign(10, {1}) == 1
    routes.leave(1)
    assert routes.assign(10, {1}) is None


@given(st.lists(st.tuples(st.integers(1, 9), st.sets(st.integers(0, 3))), max_size=60), st.integers(1, 4))
def test_it_goes_to_the_least_loaded_of_those_that_are_not_avoided(
    groups: list[tuple[int, set[int]]], num_replicas: int
) -> None:
    routes, most = router(num_replicas, most=8), 8
    tokens, held = [0] * num_replicas, [0] * num_replicas
    for num_tokens, avoid in groups:
        others = [replica for replica in range(num_replicas) if replica not in avoid] or [*range(num_replicas)]
        expected = min((r for r in others if held[r] < most), key=lambda r: (tokens[r], r), default=None)
        assert routes.assign(num_tokens, avoid) == expected
        if expected is not None:
            tokens[expected] += num_tokens
            held[expected] += 1
