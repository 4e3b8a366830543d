"""The chosen answer is learned, and its odds grow over those of the rejected one; no reference is needed."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from algorithms.preference.batch import Pairs
from algorithms.preference.config import OrpoConfig


def orpo_loss(pairs: Pairs, config: OrpoConfig) -> Tensor:
    """Negative log-likelihood of the chosen tokens, minus beta x the mean log-sigmoid of the log odds ratio.

    The probabilities are geometric means over the tokens (arXiv 2403.07691, Eqs. 3-7).
    """
    return pairs.chosen_nll - config.beta * logsigmoid(log_odds_ratio(pairs)).mean()


def log_odds_ratio(pairs: Pairs) -> Tensor:
    """[P]: log of odds(chosen) / odds(rejected), with odds(p) = p / (1 - p)."""
    chosen_P, rejected_P = pairs.chosen_P / pairs.chosen_tokens_P, pairs.rejected_P / pairs.rejected_tokens_P
    return (chosen_P - _log_complement(chosen_P)) - (rejected_P - _log_complement(rejected_P))


def _log_complement(logprob_P: Tensor) -> Tensor:
    """log(1 - p) from log p, at most -tiny: a completion of probability 1 has infinite odds."""
    return torch.log(-torch.expm1(logprob_P.clamp(max=-torch.finfo(logprob_P.dtype).eps)))
