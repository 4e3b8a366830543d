"""Each GPU has one owner, each worker lies on one node, equal inputs give equal plans; or it is said what is missing.

A pool that shares the policy's GPUs is not placed itself: its workers lie where the policy's do, so those on whose GPUs
one of them lies are placed as one.

Amounts are counted as Ray counts them, in whole ten-thousandths, so that fractional CPUs add up exactly.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import lcm

from placement.cluster import ClusterSpec
from placement.config import HOST, PoolConfig, hosts_of, hosts_per_worker

NODE_RESOURCE_SHARE = 0.001
"""What each worker takes of its pool's `node_resource`: enough to be bound to the node, too little to fill it."""

Amounts = dict[str, int]
"""Ten-thousandths of each resource, by Ray's name for it."""


class PlacementError(ValueError):
    """The pools do not fit; the message names the pool, what is missing, and what would make it fit."""


@dataclass(frozen=True)
class Bundle:
    """What one worker reserves, all of it on one node."""

    pool: str
    worker: int
    node: str
    cpus: float
    gpus: int
    """On which it computes."""
    resource: str | None
    labels: Mapping[str, str] = field(default_factory=dict)
    """What the node must bear, wherever the bundle goes when this one is gone."""
    node_id: str = ""
    """Ray's id of the node; empty for a node that is not there yet."""
    on: tuple[int, ...] = ()
    """The policy's workers with whom it lies, on their GPUs; it has none of its own then."""
    room: float = 0.0
    """CPUs beside its own, for those who lie with it."""

    @property
    def own_gpus(self) -> int:
        return 0 if self.on else self.gpus


@dataclass(frozen=True)
class PlacementPlan:
    """Every worker of every pool has one bundle; `bundles[pool][worker]` is that worker's."""

    bundles: Mapping[str, tuple[Bundle, ...]]


def plan(pools: Mapping[str, PoolConfig], cluster: ClusterSpec) -> PlacementPlan:
    """Place all pools on the cluster or raise PlacementError; the most demanding pools choose first."""
    needs = _needs(pools, _rooms(cluster, pools))
    nodes = _search(needs, _rooms(cluster, pools))
    if nodes is None:
        raise PlacementError(_shortage(needs, _rooms(cluster, pools)))
    ids = {node.name: node.node_id for node in cluster.nodes}
    bundles: dict[str, list[Bundle]] = {name: [] for name in pools}
    for need, node in zip(needs, nodes, strict=True):
        pool = need.config
        for worker in range(need.worker * need.size, (need.worker + 1) * need.size):
            bundle = Bundle(
                pool=need.pool,
                worker=worker,
                node=node,
                cpus=pool.cpus_per_worker,
                gpus=pool.gpus_per_worker,
                resource=pool.node_resource,
                labels=pool.node_labels,
                node_id=ids[node],
            )
            bundles[need.pool].append(bundle)
    for name, pool in guests_of(pools).items():
        bundles[name] = list(_beside(name, pool, pools[HOST], bundles[HOST]))
    return PlacementPlan({name: tuple(placed) for name, placed in bundles.items()})


def guests_of(pools: Mapping[str, PoolConfig]) -> dict[str, PoolConfig]:
    """The pools that lie on the policy's GPUs."""
    return {name: pool for name, pool in pools.items() if pool.colocate_with is not None}


def in_one_place(pools: Mapping[str, PoolConfig]) -> tuple[int, float]:
    """How many of the policy's workers must lie on one node, and the CPUs of those who lie with so many."""
    guests, host = guests_of(pools), pools[HOST]
    size = lcm(*(hosts_per_worker(pool, host) for pool in guests.values()))
    cpus = 0.0
    for pool in guests.values():
        on_each = Counter(place for worker in range(pool.num_workers) for place in hosts_of(worker, pool, host))
        cpus += pool.cpus_per_worker * max(on_each.values()) * (size // hosts_per_worker(pool, host))
    return size, cpus


def _beside(name: str, pool: PoolConfig, host: PoolConfig, hosts: list[Bundle]) -> Iterator[Bundle]:
    """The pool's workers, each with its own of the policy's, of which the first makes room for it."""
    for worker in range(pool.num_workers):
        on = hosts_of(worker, pool, host)
        first = hosts[on[0]]
        hosts[on[0]] = replace(first, room=first.room + pool.cpus_per_worker)
        yield Bundle(
            pool=name,
            worker=worker,
            node=first.node,
            cpus=pool.cpus_per_worker,
            gpus=pool.gpus_per_worker,
            resource=None,
            node_id=first.node_id,
            on=on,
        )


@dataclass(frozen=True)
class _Need:
    """One worker to be placed, or several that must lie on one node."""

    pool: str
    worker: int
    config: PoolConfig
    amounts: Amounts
    size: int = 1
    """So many workers; the first is `worker * size`."""
    guests: tuple[str, ...] = ()
    """The pools that lie on their GPUs, and are in the amounts."""

    @property
    def remaining(self) -> int:
        """How many such are still to be placed, itself included."""
        return self.config.num_workers // self.size - self.worker


@dataclass
class _Room:
    """What is left of a node, and how many workers of each pool it holds."""

    node: str
    order: int
    total: Amounts
    free: Amounts
    labels: Mapping[str, str]
    open_to: frozenset[str]
    """Pools whose labels the node bears."""
    workers: Counter[str] = field(default_factory=Counter)

    def capacity(self, pool: str, amounts: Amounts) -> int:
        """How many workers of the pool, each of these amounts, still fit."""
        if pool not in self.open_to:
            return 0
        return min(self.free.get(name, 0) // amount for name, amount in amounts.items())

    def take(self, need: _Need) -> None:
        self.free = {name: amount - need.amounts.get(name, 0) for name, amount in self.free.items()}
        self.workers[need.pool] += 1

    def give_back(self, need: _Need) -> None:
        self.free = {name: amount + need.amounts.get(name, 0) for name, amount in self.free.items()}
        self.workers[need.pool] -= 1


_WHOLE = 10_000
"""One GPU, or one CPU, in the unit of Amounts."""


def ten_thousandths(amount: float) -> int:
    """As Ray counts."""
    return round(amount * _WHOLE)


def _amounts(name: str, pool: PoolConfig, size: int = 1, guests_cpus: float = 0.0) -> Amounts:
    """What one worker takes, or `size` with their guests; nothing that it does not need, and a share of a CPU at least.

    Each reserves as much as one with all its guests: there may be fewer of them than there is room for.
    """
    gpus, cpus = size * pool.gpus_per_worker, size * pool.cpus_per_worker + guests_cpus
    amounts = {"GPU": ten_thousandths(gpus), "CPU": max(1, ten_thousandths(cpus))}
    if pool.node_resource in amounts:
        raise PlacementError(
            f"pools.{name}.node_resource: {pool.node_resource} is not a custom resource; "
            f"set pools.{name}.{pool.node_resource.lower()}s_per_worker, and node_resource to null"
        )
    if pool.node_resource is not None:
        amounts[pool.node_resource] = size * ten_thousandths(NODE_RESOURCE_SHARE)
    return {resource: amount for resource, amount in amounts.items() if amount}


def _rooms(cluster: ClusterSpec, pools: Mapping[str, PoolConfig]) -> list[_Room]:
    """The empty nodes, with what matters to the pools: nodes that differ in nothing else are interchangeable."""
    custom = {pool.node_resource for pool in pools.values()}
    rooms = []
    for order, node in enumerate(cluster.nodes):
        offered = {name: amount for name, amount in node.resources.items() if name in custom and amount > 0}
        offered |= {"CPU": node.cpus, "GPU": node.gpus}
        total = {name: ten_thousandths(amount) for name, amount in offered.items()}
        open_to = frozenset(name for name, pool in pools.items() if pool.node_labels.items() <= node.labels.items())
        rooms.append(_Room(node.name, order, total, dict(total), node.labels, open_to))
    return rooms


def _needs(pools: Mapping[str, PoolConfig], rooms: Sequence[_Room]) -> list[_Need]:
    """All workers in the order in which they choose: most GPUs first, then fewest nodes to choose from, then CPUs."""
    guests = guests_of(pools)
    size, guests_cpus = in_one_place(pools) if guests else (1, 0.0)
    placed = {name: pool for name, pool in pools.items() if pool.colocate_with is None}
    amounts = {name: _amounts(name, pool) for name, pool in placed.items() if name != HOST}
    if HOST in placed:
        amounts[HOST] = _amounts(HOST, placed[HOST], size, guests_cpus)

    def demand(name: str) -> tuple[int, ...]:
        num_nodes = sum(room.capacity(name, amounts[name]) > 0 for room in rooms)
        return -amounts[name].get("GPU", 0), num_nodes, -amounts[name]["CPU"]

    return [
        _Need(name, worker, placed[name], amounts[name], *((size, tuple(guests)) if name == HOST else ()))
        for name in sorted(placed, key=demand)
        for worker in range(placed[name].num_workers // (size if name == HOST else 1))
    ]


def _choices(need: _Need, rooms: Sequence[_Room]) -> list[_Room]:
    """The nodes that can hold the worker, the best one first."""

    def pack(room: _Room) -> tuple[int | bool, ...]:
        # Fill the node that the pool is on; then one that holds what remains of the pool; then the fullest.
        splits = room.capacity(need.pool, need.amounts) < need.remaining
        return -room.workers[need.pool], splits, room.free["GPU"], room.free["CPU"], room.order

    def spread(room: _Room) -> tuple[int, ...]:
        free_gpus = room.free["GPU"] if "GPU" in need.amounts else 0
        return room.workers[need.pool], -free_gpus, -room.free["CPU"], room.order

    feasible = [room for room in rooms if room.capacity(need.pool, need.amounts) > 0]
    return sorted(feasible, key=pack if need.config.strategy == "pack" else spread)


MAX_DETOURS = 10_000
"""Steps beyond the first choices after which the search gives up, as if nothing fitted; few plans need any."""


def _search(needs: Sequence[_Need], rooms: Sequence[_Room]) -> list[str] | None:
    """The node of each worker: first choices throughout where that works, else depth-first over the other choices."""
    if not needs:
        return []
    if _exceeds(needs, rooms):
        return None
    chosen: list[_Room] = []
    open_choices: list[Iterator[_Room]] = [iter(_choices(needs[0], rooms))]
    dead_ends: set[tuple[object, ...]] = set()
    for _ in range(MAX_DETOURS + len(needs)):
        room = next(open_choices[-1], None)
        if room is not None:
            room.take(needs[len(chosen)])
            chosen.append(room)
            if len(chosen) == len(needs):
                return [room.node for room in chosen]
            if _state(len(chosen), rooms) not in dead_ends:
                open_choices.append(iter(_choices(needs[len(chosen)], rooms)))
                continue
        else:
            dead_ends.add(_state(len(chosen), rooms))
            open_choices.pop()
            if not chosen:
                return None
        undone = chosen.pop()
        undone.give_back(needs[len(chosen)])
    return None


def _exceeds(needs: Sequence[_Need], rooms: Sequence[_Room]) -> bool:
    """Whether the workers together need more than all nodes have: then no search is needed."""
    needed: Counter[str] = Counter()
    offered: Counter[str] = Counter()
    for need in needs:
        needed.update(need.amounts)
    for room in rooms:
        offered.update(room.free)
    return any(amount > offered[name] for name, amount in needed.items())


def _state(num_placed: int, rooms: Sequence[_Room]) -> tuple[object, ...]:
    """What decides whether the rest can be placed; equal nodes are interchangeable."""
    return num_placed, *sorted((tuple(sorted(room.free.items())), tuple(sorted(room.open_to))) for room in rooms)


def _shortage(needs: Sequence[_Need], rooms: list[_Room]) -> str:
    """What is missing where first choices come to an end, and what would make it fit."""
    if not rooms:
        return f"pool {needs[0].pool!r} needs a node, and the cluster has none: start Ray on at least one machine"
    need, rooms = _first_misfit(needs, rooms)
    pool, resource, num_workers = need.pool, need.config.node_resource, need.config.num_workers // need.size
    if resource is not None:
        rooms = [room for room in rooms if resource in room.total]
        if not rooms:
            return (
                f"pool {pool!r} needs nodes with the custom resource {resource!r}, and no node offers it: start Ray on "
                f"them with --resources='{{\"{resource}\": 1}}', or remove pools.{pool}.node_resource"
            )
    if not any(pool in room.open_to for room in rooms):
        return _no_node_bears(need, rooms)
    rooms = [room for room in rooms if pool in room.open_to]
    # What most nodes lack; GPUs before CPUs where it is the same number.
    kind = max(need.amounts, key=lambda name: sum(room.free.get(name, 0) < need.amounts[name] for room in rooms))
    missing = need.amounts[kind] * need.remaining
    fit = ", ".join(f"{room.node} {room.workers[pool]}" for room in rooms if room.workers[pool])
    held = _held(need, kind, needs, rooms)
    parts = [
        f"pool {pool!r}{_with(need)} needs {num_workers} {_who(need, num_workers > 1)} x "
        f"{_count(need.amounts[kind], kind)}",
        f"{need.worker} {_who(need, need.worker > 1)} fit{'s' * (need.worker == 1)} ({fit})"
        if fit
        else f"no {_who(need)} fits",
        ", ".join(f"{other!r} holds {_count(amount, kind)}" for other, amount in held.items()),
        f"{_count(missing, kind)} {'is' if missing == _WHOLE else 'are'} missing",
    ]
    return f"{'; '.join(filter(None, parts))}: {', or '.join(_remedies(need, kind, held, rooms))}"


def _who(need: _Need, many: bool = False) -> str:
    """Those who are placed as one, in words."""
    return f"group{'s' * many} of {need.size} workers on one node" if need.size > 1 else f"worker{'s' * many}"


def _with(need: _Need) -> str:
    """Whom a shortage is about besides."""
    return f", with {' and '.join(map(repr, need.guests))} on its workers," if need.guests else ""


def _no_node_bears(need: _Need, rooms: Sequence[_Room]) -> str:
    """Which labels are on none of the nodes, what they have in their place, and how they are given."""
    labels, resource, several = need.config.node_labels, need.config.node_resource, len(need.config.node_labels) > 1
    wanted = ",".join(f"{label}={value}" for label, value in labels.items())
    others = sorted({f"{label}={room.labels[label]}" for room in rooms for label in labels if label in room.labels})
    there = f" (there is {', '.join(others)})" if others else ""
    return (
        f"pool {need.pool!r} needs nodes with the label{'s' * several} {wanted}, and no node"
        f"{'' if resource is None else f' with {resource!r}'} has {'all of them' if several else 'it'}{there}: start "
        f"Ray on them with --labels={wanted}, or remove pools.{need.pool}.node_labels"
    )


def _first_misfit(needs: Sequence[_Need], rooms: list[_Room]) -> tuple[_Need, list[_Room]]:
    """The worker at which first choices end, and the nodes as they are then."""
    for need in needs:
        choices = _choices(need, rooms)
        if not choices:
            return need, rooms
        choices[0].take(need)
    raise AssertionError("first choices place every worker, so the search has found a plan")


def _held(need: _Need, kind: str, needs: Sequence[_Need], rooms: Sequence[_Room]) -> Amounts:
    """What other pools have taken of the resource, by pool, on the nodes that this one could use."""
    shares = {other.pool: other.amounts.get(kind, 0) for other in needs if other.pool != need.pool}
    held = {pool: share * sum(room.workers[pool] for room in rooms) for pool, share in shares.items()}
    return {pool: amount for pool, amount in held.items() if amount}


def _remedies(need: _Need, kind: str, held: Amounts, rooms: Sequence[_Room]) -> Iterator[str]:
    """What to add to the cluster, or what to set in the recipe."""
    each, num_missing = need.amounts[kind], need.remaining
    if num_missing == 1:
        yield f"add a node with {_count(each, 'free ' + kind)}"
    else:
        share = f"{_count(each, kind)} on one node for each {'worker' if need.size == 1 else 'of them'}"
        yield f"add nodes with {_count(each * num_missing, 'free ' + kind)} ({share})"
    largest = max(room.total.get(kind, 0) for room in rooms)
    if kind in ("GPU", "CPU") and 0 < largest < each and not need.guests:
        yield f"set pools.{need.pool}.{kind.lower()}s_per_worker={largest / _WHOLE:g}, all that the largest node has"
        return
    if need.worker:
        yield f"set pools.{need.pool}.num_workers={need.worker * need.size}"
    elif held:
        yield f"lower pools.{max(held, key=lambda pool: held[pool])}.num_workers"
    if kind == "CPU":
        yield "lower cpus_per_worker, which reserves a share and limits nothing"


def _count(amount: int, kind: str) -> str:
    """An amount as `2 GPUs`, `1 free CPU`, `0.001 h100`."""
    return f"{amount / _WHOLE:g} {kind}{'s' if amount != _WHOLE and kind.endswith(('GPU', 'CPU')) else ''}"
