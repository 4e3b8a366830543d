"""The papers of methods that do not train on GRPO's loss, in slow and obvious loops; nothing is shared with ours.

Distributions are lists of probabilities, one for each token of the vocabulary; of what is trained they are tensors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Distribution = Sequence[Tensor]


def kl(one: Distribution, other: Distribution) -> Tensor:
    return sum((p * torch.log(p / q) for p, q in zip(one, other, strict=True)), torch.zeros(()))


def jensen_shannon(teacher: Distribution, student: Distribution, beta: float) -> Tensor:
    """beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q, P the teacher."""
    middle = [beta * p + (1 - beta) * q for p, q in zip(teacher, student, strict=True)]
    return beta * kl(teacher, middle) + (1 - beta) * kl(student, middle)


def gkd(
    of_student: Sequence[tuple[Sequence[Distribution], Sequence[Distribution]]],
    of_data: Sequence[tuple[Sequence[Distribution], Sequence[Distribution]]],
    beta: float,
    lmbda: float,
) -> Tensor:
    """Of sequences (teacher's, student's distribution at each token): the mean of each one's mean over its tokens."""

    def mean(sequences: Sequence[tuple[Sequence[Distribution], Sequence[Distribution]]]) -> Tensor:
        total = torch.zeros(())
        for teacher, student in sequences:
            for p, q in zip(teacher, student, strict=True):
                total = total + jensen_shannon(p, q, beta) / len(student)
        return total / len(sequences)

    return lmbda * mean(of_student) + (1 - lmbda) * mean(of_data)


def online_dpo(
    better: Sequence[Sequence[Tensor]],
    worse: Sequence[Sequence[Tensor]],
    reference_better: Sequence[Sequence[float]],
    reference_worse: Sequence[Sequence[float]],
    beta: float,
    loss_type: str,
) -> Tensor:
    """Of log pi of each token: the mean over the pairs of - log sigma(beta (c - r)), or of (c - r - 1 / 2 beta)^2."""
    total = torch.zeros(())
    for b, w, of_b, of_w in zip(better, worse, reference_better, reference_worse, strict=True):
        c = sum((now - then for now, then in zip(b, of_b, strict=True)), torch.zeros(()))
        r = sum((now - then for now, then in zip(w, of_w, strict=True)), torch.zeros(()))
        if loss_type == "ipo":
            total = total + (c - r - 1 / (2 * beta)) ** 2
        else:
            total = total - torch.log(1 / (1 + torch.exp(-beta * (c - r))))
    return total / len(better)


def probabilities(logits: Tensor) -> list[Tensor]:
    largest = max(value.item() for value in logits)
    powers = [torch.exp(value - largest) for value in logits]
    return [power / sum(powers) for power in powers]


def logprob(logits: Tensor, token: int) -> Tensor:
    """The same of one token, and its logarithm."""
    largest = max(value.item() for value in logits)
    return logits[token] - largest - torch.log(sum((torch.exp(v - largest) for v in logits), torch.zeros(())))
