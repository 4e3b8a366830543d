"""Bytes that the workers of one node hold in its own memory at the worst moment, beside what any process takes."""

from placement.memory.footprint import PolicyLoad, ReferenceLoad
from placement.memory.shape import ModelShape


def policy_host_bytes(shape: ModelShape, load: PolicyLoad, ranks_here: int, holds_first: bool) -> float:
    """Each rank loads the model whole before it is sharded; later rank 0 gathers a checkpoint, which it keeps.

    An optimizer that is kept here has 12 bytes a parameter, and its gradient 4 (ZeRO-Offload, arXiv 2101.06840);
    weights that are kept here have their own size.
    """
    loading = (load.bytes_per_weight * shape.num_parameters + load.teacher) * ranks_here
    trained = shape.num_parameters if load.num_trained is None else load.num_trained
    kept = 16.0 * trained / load.num_ranks * ranks_here if load.offload else 0.0
    if load.offload_weights:
        adapters = 0 if load.num_trained is None else load.num_trained
        kept += load.bytes_per_weight * (shape.num_parameters + adapters) / load.num_ranks * ranks_here
    return max(loading, kept + (12.0 * trained if holds_first else 0.0))


def reference_host_bytes(shape: ModelShape, load: ReferenceLoad, workers_here: int) -> float:
    """Each worker loads the model whole, and then moves it."""
    return float(load.bytes_per_weight * shape.num_parameters * workers_here)
