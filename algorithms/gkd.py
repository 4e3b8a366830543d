"""On-policy distillation from whole distributions: on samples of the student, and on the data's completions (GKD).

The loss is lmbda x the mean divergence over the tokens that the student has sampled + (1 - lmbda) x the mean over those
of the data: what TRL's trainer, which draws one of the two for each batch, minimises on average.
"""

from collections.abc import Sequence

from pydantic import BaseModel, Field

from algorithms.config import CLOSED


class DistillationConfig(BaseModel):
    """Generalised knowledge distillation (arXiv 2306.13649); names and defaults are those of TRL's GKDTrainer."""

    model_config = CLOSED

    beta: float = Field(0.5, ge=0.0, le=1.0)
    """Which divergence: 0 is the forward KL(teacher || student), 1 the reverse KL(student || teacher), and between them
    the Jensen-Shannon divergence whose mixture has this much of the teacher."""
    lmbda: float = Field(0.5, gt=0.0, le=1.0)
    """Share of the loss that is on what the student samples; the rest is on the data's own completions, which are a
    column `completion`. At 1 none are needed."""
    temperature: float = Field(1.0, gt=0.0)
    """That the logits of both are divided by; TRL's loss has 1.0, and its key of this name is of sampling."""


def token_weights(of_student: Sequence[int], of_data: Sequence[int], lmbda: float) -> tuple[float, float]:
    """What each token weighs that the student has sampled, and each of the data; by the tokens of each sequence.

    Without data nothing but the student's samples counts, whatever `lmbda`.
    """
    share = lmbda if of_data else 1.0
    return share / max(sum(of_student), 1), (1 - share) / max(sum(of_data), 1)
