"""A completion that comes near the length limit is punished a little more with every token (DAPO, arXiv 2503.14476)."""


def soft_overlong_punishment(length: int, max_completion_length: int, soft_punish_cache: int) -> float:
    """0 up to max_completion_length - soft_punish_cache tokens, then linearly down to -1 at max_completion_length."""
    begin = max_completion_length - soft_punish_cache
    if length <= begin:
        return 0.0
    return max(-1.0, (begin - length) / soft_punish_cache)
