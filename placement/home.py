"""A worker that shares the policy's GPUs computes on those that it was told of, or not at all."""

import os

from placement.plan import PlacementError

NODE_ID = "PACELINE_GPUS_OF_NODE"
"""Name of the variable that says whose GPUs CUDA_VISIBLE_DEVICES numbers."""


def check_home() -> None:
    """PlacementError in a worker that Ray has built again on another machine, where the numbers are others' GPUs."""
    told = os.environ.get(NODE_ID)
    if told is None:
        return
    import ray  # not before: processes that fork workers load our actors without it

    if told != ray.get_runtime_context().get_node_id():
        raise PlacementError("the GPUs that it shared are gone with their machine; give the command again")
