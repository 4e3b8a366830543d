"""Which teams can share out a model's attention heads; read from its config, so that planning loads no torch."""

from typing import Any


def check_heads(model: Any, size: int, key: str) -> None:
    """ValueError when teams of that size cannot share out the model's heads; `key` is the recipe's for the size."""
    if size == 1:
        return
    config = model.config.get_text_config()
    num_heads = int(config.num_attention_heads)
    num_kv_heads = int(getattr(config, "num_key_value_heads", None) or num_heads)
    if (problem := uneven_heads(num_heads, num_kv_heads, size)) is not None:
        raise ValueError(f"{key}: {problem}")


def uneven_heads(num_heads: int, num_kv_heads: int, size: int) -> str | None:
    """Why a team of that size cannot share out a model's heads, and what to set; None when it can."""
    if _is_even(num_heads, num_kv_heads, size):
        return None
    sizes = [other for other in range(1, num_heads + 1) if _is_even(num_heads, num_kv_heads, other)]
    return (
        f"{size} ranks cannot share out the model's {num_heads} attention heads and {num_kv_heads} heads of keys and "
        f"values evenly; set it to {', '.join(map(str, sizes[:-1]))}{' or ' if len(sizes) > 1 else ''}{sizes[-1]}"
    )


def _is_even(num_heads: int, num_kv_heads: int, size: int) -> bool:
    return num_heads % size == 0 and (num_kv_heads % size == 0 or size % num_kv_heads == 0)
