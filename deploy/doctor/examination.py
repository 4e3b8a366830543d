"""Which checks there are for the recipes of a command, in the order in which they are made."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from actors.recipe.pools import used_pools
from actors.recipe.schema import GrpoRecipe, Recipe
from deploy.doctor import cluster, data, engines, gpus, machine, rewards, storage, versions
from deploy.doctor.check import LEVELS, Check, Finding, passed, skipped
from deploy.doctor.machine import Machine
from deploy.host_memory import bytes_by_node
from deploy.nodes import LOOK_TIMEOUT_S, probe_file
from placement.cluster import ClusterSpec, from_ray
from placement.cluster import this_machine as machine_to_plan_for
from placement.plan import PlacementError, PlacementPlan, plan

_QUICK_S, _DATA_S, _LOAD_S = 30.0, 300.0, 180.0
_NO_RAY = "Ray was not reached"


class Examination:
    """The checks of one command; later ones know what earlier ones have seen of the machines."""

    def __init__(
        self, recipes: Sequence[Recipe], address: str | None, deep: bool, session: contextlib.ExitStack
    ) -> None:
        self._recipes = recipes
        self._address = address
        self._deep = deep
        self._session = session
        self._machines: dict[str, Machine] = {}
        """By their names in plans; empty until they have been seen."""
        self._workers: Counter[str] = Counter()
        """By node, of the run that has most there."""
        self._engines: Counter[str] = Counter()
        """The same of replicas alone."""
        self._with_model: set[str] = set()
        """Recipes whose model's tokenizer and config are here, by name."""
        self._told: dict[str, Any] = {}
        """What CUDA says."""

    def checks(self) -> Iterator[Check]:
        """In the order in which what they find helps most."""
        wanted = 0 if self._address is not None else self._num_gpus()
        yield Check("python", _QUICK_S, versions.check_python)
        yield Check("packages", _QUICK_S, lambda: versions.check_packages(wanted > 0))
        yield from self._of_gpus(wanted)
        yield Check("ray", cluster.REACH_TIMEOUT_S, lambda: cluster.reach(self._address, self._session))
        yield Check("machines", LOOK_TIMEOUT_S, self._look)
        yield from self._of_machines()
        for recipe in self._recipes:
            whose = f"{recipe.name}: " if len(self._recipes) > 1 else ""
            for check in self._of_recipe(recipe):
                yield Check(f"{whose}{check.name}", check.deadline_s, check.look)

    def _of_gpus(self, wanted: int) -> Iterator[Check]:
        transports = [recipe.sync.transport for recipe in self._recipes if isinstance(recipe, GrpoRecipe)]
        yield Check("driver", _QUICK_S, lambda: gpus.check_driver(gpus.listed(), wanted))
        yield Check("cuda", gpus.CHILD_TIMEOUT_S + _QUICK_S, lambda: self._cuda(wanted))
        yield Check("nccl", _QUICK_S, lambda: gpus.check_wire(self._told, max(transports, default="gloo")))

    def _of_machines(self) -> Iterator[Check]:
        if self._address is not None:
            yield Check("same packages", _QUICK_S, self._same)
        yield Check("shared memory", _QUICK_S, lambda: self._worst(lambda n, m: machine.check_shm(m, self._engines[n])))
        yield Check("limits", _QUICK_S, lambda: self._worst(lambda n, m: machine.check_limits(m, self._workers[n])))
        wanted = self._num_ports()
        yield Check("ports", _QUICK_S, lambda: self._worst(lambda _, m: machine.check_ports(m, wanted)))

    def _of_recipe(self, recipe: Recipe) -> Iterator[Check]:
        yield Check("placement", _QUICK_S, lambda: self._on_cluster(partial(cluster.check_placement, recipe)))
        yield Check("gpu memory", _QUICK_S, lambda: self._on_cluster(self._gpu_memory(recipe)))
        yield Check("host memory", _QUICK_S, lambda: self._host_memory(recipe))
        yield Check("run folder", _QUICK_S, lambda: storage.check_writable(recipe.folder))
        if len(self._machines) > 1:
            yield Check("shared storage", _QUICK_S, lambda: self._shared(recipe))
        yield Check("disk", _LOAD_S, lambda: self._disk(recipe))
        yield Check("dataset", _DATA_S, lambda: data.check_dataset(recipe))
        yield Check("model", _LOAD_S, lambda: self._model(recipe))
        for check in self._of_words(recipe):
            has_model = recipe.name in self._with_model
            yield check if has_model else Check(check.name, _QUICK_S, lambda: skipped("the model is not here"))

    def _of_words(self, recipe: Recipe) -> Iterator[Check]:
        """What is looked at with the model's tokenizer."""
        yield Check("prompts", _DATA_S, lambda: data.check_prompts(recipe))
        yield Check("tokenizer", _LOAD_S, lambda: data.check_tokenizer(recipe))
        if isinstance(recipe, GrpoRecipe):
            yield from self._of_grpo(recipe)

    def _of_grpo(self, recipe: GrpoRecipe) -> Iterator[Check]:
        for index in range(len(recipe.rewards.functions)):
            yield Check("reward", rewards.deadline_s(recipe), partial(rewards.check_reward_function, recipe, index))
        if not self._deep:
            yield Check("agreement", _QUICK_S, lambda: skipped("an engine is started for it with --deep alone"))
            return
        sizes = [size for node in self._machines.values() for size in node.gpus_gb]
        deadline = 2 * recipe.rollout.start_timeout_s + recipe.generation.timeout_s + _LOAD_S
        yield Check("agreement", deadline, lambda: engines.check_agreement(recipe, min(sizes, default=None)))

    # What the checks are told -------------------------------------------------------------------------------------

    def _look(self) -> Finding:
        """Every machine that the run may use is seen, and who would be there."""
        wanted = self._num_ports()
        spec = self._cluster()
        if spec is None:
            return skipped(_NO_RAY)
        if self._address is None:
            if cluster.is_reached():
                cluster.run_a_task()
            self._machines = {spec.nodes[0].name: machine.this_machine(wanted)}
        else:
            self._machines = cluster.look_at_nodes(wanted)
        for recipe in self._recipes:
            workers, replicas = cluster.workers_of(self._placed(recipe))
            self._workers |= workers
            self._engines |= replicas
        sizes = (f"{n}: {m.memory / machine.GB:.0f} GB, {len(m.gpus_gb)} GPUs" for n, m in self._machines.items())
        return passed("; ".join(sizes))

    def _model(self, recipe: Recipe) -> Finding:
        finding = data.check_model(recipe)
        self._with_model.add(recipe.name)
        return finding

    def _cuda(self, wanted: int) -> Finding:
        if gpus.listed() is None:
            return skipped(gpus.NO_GPU)
        self._told = gpus.asked()
        return gpus.check_cuda(self._told, wanted)

    def _same(self) -> Finding:
        ours = machine.this_machine(0)
        return self._worst(lambda _, node: machine.check_same(node, ours))

    def _shared(self, recipe: Recipe) -> Finding:
        with probe_file(recipe.folder) as probe:
            return storage.check_shared(recipe.folder, cluster.nodes_that_see(probe))

    def _worst(self, judge: Callable[[str, Machine], Finding]) -> Finding:
        """Of the machines, the finding that matters most."""
        if not self._machines:
            return skipped(_NO_RAY)
        findings = [judge(name, each) for name, each in self._machines.items()]
        worst = max(findings, key=lambda finding: LEVELS.index(finding.level))
        others = sum(finding.level != worst.level for finding in findings)
        alike = len(findings) - others
        note = f" (so are {alike - 1} more of {len(findings)} nodes)" if alike > 1 else ""
        return Finding(worst.level, worst.text + note, worst.fix)

    def _cluster(self) -> ClusterSpec | None:
        """What the pools are placed on; None when Ray was to be reached, and was not."""
        if self._address is None:
            return machine_to_plan_for()
        import ray

        return from_ray(ray.nodes()) if ray.is_initialized() else None

    def _on_cluster(self, check: Callable[[ClusterSpec], Finding]) -> Finding:
        spec = self._cluster()
        return skipped(_NO_RAY) if spec is None else check(spec)

    def _gpu_memory(self, recipe: Recipe) -> Callable[[ClusterSpec], Finding]:
        return lambda spec: cluster.check_gpu_memory(recipe, spec, self._machines.values())

    def _host_memory(self, recipe: Recipe) -> Finding:
        placed = self._placed(recipe)
        if placed is None:
            return skipped("the workers have no place")
        needs = bytes_by_node(recipe, placed)
        return self._worst(lambda n, m: machine.check_memory(m, None if needs is None else float(needs[n])))

    def _disk(self, recipe: Recipe) -> Finding:
        keep, folder = recipe.checkpoint.keep, recipe.folder
        return storage.check_disk(storage.free_bytes(folder), storage.bytes_needed(recipe), keep, folder)

    def _placed(self, recipe: Recipe) -> PlacementPlan | None:
        """None where the recipe does not fit, which `placement` tells."""
        with contextlib.suppress(PlacementError):
            spec = self._cluster()
            return None if spec is None else plan(used_pools(recipe), spec)
        return None

    def _num_gpus(self) -> int:
        """GPUs of the workers of the run that has most."""
        pools = (used_pools(recipe).values() for recipe in self._recipes)
        own = ([p.num_workers * p.gpus_per_worker for p in each if p.colocate_with is None] for each in pools)
        return max(map(sum, own), default=0)

    def _num_ports(self) -> int:
        workers = (sum(pool.num_workers for pool in used_pools(recipe).values()) for recipe in self._recipes)
        return machine.num_ports(max(workers, default=0))
