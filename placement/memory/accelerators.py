"""A node tells its GPUs' memory only where Ray's name for them stands for one size."""

from placement.cluster import NodeSpec

_PREFIX = "accelerator_type:"
MEMORY_GB = {
    "A10G": 24,
    "A100-40G": 40,
    "A100-80G": 80,
    "B200": 180,
    "H100": 80,
    "H20": 96,
    "H200": 141,
    "L4": 24,
    "L40S": 48,
    "T4": 16,
}
"""By the name that Ray gives a node's accelerator. V100 and plain A100 come in two sizes, and are not here."""


def gpu_memory_gb(node: NodeSpec) -> float | None:
    """Memory of each of the node's GPUs (GB), None where it cannot be told."""
    names = [name.removeprefix(_PREFIX) for name in node.resources if name.startswith(_PREFIX)]
    sizes = {MEMORY_GB.get(name) for name in names}
    known = [size for size in sizes if size is not None]
    return float(min(known)) if known and None not in sizes else None
