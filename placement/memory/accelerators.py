"""A node tells its GPUs' memory only where Ray's name for them stands for one size.

It is what drivers show, which is less than what is sold: a part is the driver's own, and where the memory is GDDR, a
sixteenth holds the bits that correct errors. A GB is 2**30 bytes here. None of these was looked at on such a GPU here.
"""

from placement.cluster import NodeSpec

_PREFIX = "accelerator_type:"
MEMORY_GB = {
    "A10G": 22.5,
    "A100-40G": 39.4,
    "A100-80G": 79.2,
    "B200": 178.0,
    "H100": 79.6,
    "H20": 95.0,
    "H200": 140.0,
    "L4": 22.5,
    "L40S": 45.0,
    "T4": 15.0,
}
"""By the name that Ray gives a node's accelerator. V100 and plain A100 come in two sizes, and are not here."""


def gpu_memory_gb(node: NodeSpec) -> float | None:
    """Memory of each of the node's GPUs (GB), None where it cannot be told."""
    names = [name.removeprefix(_PREFIX) for name in node.resources if name.startswith(_PREFIX)]
    sizes = {MEMORY_GB.get(name) for name in names}
    known = [size for size in sizes if size is not None]
    return float(min(known)) if known and None not in sizes else None
