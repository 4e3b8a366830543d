"""How large a model is can be told from its folder without loading it, or is not known. Pure reading; no torch."""

import json
from math import prod
from pathlib import Path


def num_elements(folder: Path) -> int | None:
    """Elements of all tensors in the folder's safetensors files; None where there are none, or none that can be read.

    The format: eight bytes with the length of a JSON header (little-endian), the header, the data.
    """
    total = 0
    try:
        for path in folder.glob("*.safetensors"):
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            total += sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, MemoryError):
        return None
    return total or None
