"""One micro-batch's share of the loss of the global batch: one file for each ingredient of the formula.

grpo.py         the whole: -(policy term) x weight + beta KL - entropy_coef H, of GRPO and all its kin
tokens.py       what the formula is about: the loss tokens of one micro-batch
ratio.py        the old probabilities, and the ratio against them: per token or per sequence
surrogate.py    what a ratio and an advantage cost: clipped (PPO), clipped twice (dual clip), or CISPO
weights.py      the importance weight of a token, 0 where a mask rejects it
kl.py           the distance from the reference: as a term of the loss, or in the advantages
value.py        what the critic of PPO learns: clipped values against returns
mean.py         which mean over the global batch the loss is
sft.py          the supervised loss
"""

from algorithms.losses.grpo import grpo_loss
from algorithms.losses.mean import Normalizer
from algorithms.losses.sft import sft_loss
from algorithms.losses.value import value_loss

__all__ = ["Normalizer", "grpo_loss", "sft_loss", "value_loss"]
