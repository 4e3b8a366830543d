"""What a sequence costs the policy grows faster than its length: attention looks at all that came before."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SequenceCosts:
    """Multiplications of a pass over a sequence, in units of what the layers cost a token without attention and head.

    Attention inside each sequence costs a token in proportion to its place; the output head only loss tokens.
    """

    even_length: float = math.inf
    """Tokens of the sequence in which attention costs as much as the rest of the layers; infinite: nothing."""
    head: float = 0.0
    """The output head's share of one loss token."""

    def of(self, num_tokens: int, num_loss_tokens: int) -> float:
        return num_tokens * (1.0 + num_tokens / self.even_length) + self.head * num_loss_tokens

    def shared(self, num_tokens: int) -> float:
        """Of a beginning of so many tokens, what a pass pays once for all sequences that share it: the layers.

        In attention each sequence pays for the whole of it (`actors/model/segments.py`): on GPUs always; on CPUs one
        that adds less than it shares pays less, which is not counted.
        """
        return float(num_tokens)
