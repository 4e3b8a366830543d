"""What a recipe may say about losses on preferences; names and defaults are TRL's."""

from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator

from algorithms.config import CLOSED, STORED

DpoLoss = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
]
DIVERGING = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
"""The losses that know `f_divergence_type`: those of the difference of the two scores."""
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
"""The losses that know `label_smoothing`."""


class DpoConfig(BaseModel):
    """Direct preference optimisation (arXiv 2305.18290) and its variants, as TRL's DPOTrainer computes them."""

    model_config = CLOSED

    loss_type: tuple[DpoLoss, ...] = Field(("sigmoid",), min_length=1)
    """One loss, or a list of losses that are summed, such as [sigmoid, sft]."""
    loss_weights: tuple[float, ...] | None = None
    """Weight of each loss of the list; null weighs each with 1."""
    beta: float = Field(0.1, gt=0.0)
    """How much a departure from the reference costs; of `ipo` the regularisation, tau."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5)
    """Share of the preferences that are taken to be the wrong way round, for exo_pair, robust and aot."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Which divergence from the reference is held (arXiv 2309.16240)."""
    f_alpha_divergence_coef: float = Field(0.5)
    """Alpha, for alpha_divergence: towards 0 the forward, towards 1 the reverse KL divergence."""
    discopop_tau: float = Field(0.05, gt=0.0)
    """Temperature of the mixture, for discopop."""

    @field_validator("loss_type", mode="before")
    @classmethod
    def _one_or_more(cls, given: Any) -> Any:
        names = [given] if isinstance(given, str) else given
        known = get_args(DpoLoss)
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError("loss_type: write the name of a loss, or a list of names")
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"loss_type: there is no loss {unknown[0]!r}; choose from {', '.join(known)}")
        return tuple(names)

    @model_validator(mode="after")
    def _sound(self, info: ValidationInfo) -> Self:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights: {len(self.loss_weights)} weights for {len(self.loss_type)} losses; write one for each "
                "of loss_type"
            )
        if "exo_pair" in self.loss_type and self.label_smoothing == 0:
            raise ValueError("label_smoothing: exo_pair is infinite at 0; set label_smoothing, such as to 0.001")
        if self.f_divergence_type != "reverse_kl" and not set(self.loss_type) <= set(DIVERGING):
            raise ValueError(
                f"f_divergence_type: only {', '.join(DIVERGING)} know {self.f_divergence_type}; take one of them, or "
                "reverse_kl"
            )
        if self.f_alpha_divergence_coef != 0.5 and self.f_divergence_type != "alpha_divergence":
            raise ValueError(
                f"f_alpha_divergence_coef: {self.f_divergence_type} does not know it; set f_divergence_type to "
                "alpha_divergence, or remove it"
            )
        if self.discopop_tau != 0.05 and "discopop" not in self.loss_type and info.context != STORED:
            raise ValueError("discopop_tau: only discopop knows it; remove it, or set loss_type to discopop")
        if self.label_smoothing > 0 and not set(self.loss_type) & set(SMOOTHED):
            raise ValueError(
                f"label_smoothing: only {', '.join(SMOOTHED)} know it; take one of them (robust is the sigmoid loss "
                "with smoothed labels), or remove label_smoothing"
            )
        return self

    @property
    def weighted(self) -> tuple[tuple[DpoLoss, float], ...]:
        """Each loss with its weight."""
        weights = self.loss_weights or (1.0,) * len(self.loss_type)
        return tuple(zip(self.loss_type, weights, strict=True))


class KtoConfig(BaseModel):
    """Kahneman-Tversky optimisation (arXiv 2402.01306) on completions that are good or bad, as TRL's KTOTrainer."""

    model_config = CLOSED

    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    beta: float = Field(0.1, gt=0.0)
    """How much a departure from the reference costs."""
    desirable_weight: float = Field(1.0, ge=0.0)
    """Of the good completions. With n good and m bad ones the paper wants n x desirable_weight about equal to
    m x undesirable_weight."""
    undesirable_weight: float = Field(1.0, ge=0.0)


class OrpoConfig(BaseModel):
    """Odds-ratio preference optimisation (arXiv 2403.07691): no reference, and the chosen answer is learned too."""

    model_config = CLOSED

    beta: float = Field(0.1, ge=0.0)
    """Weight of the odds ratio beside the likelihood of the chosen answer (lambda in the paper)."""


class CpoConfig(BaseModel):
    """Contrastive preference optimisation (arXiv 2401.08417), SimPO (arXiv 2405.14734) or AlphaPO (arXiv 2501.03884):
    without a reference."""

    model_config = CLOSED

    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo", "alphapo"] = "sigmoid"
    beta: float = Field(0.1, gt=0.0)
    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5)
    """Share of the preferences that are taken to be the wrong way round, for sigmoid, simpo and alphapo."""
    cpo_alpha: float = Field(1.0, ge=0.0)
    """Weight of the likelihood of the chosen answer; plain SimPO has 0, and so has alphapo, where it is the default."""
    simpo_gamma: float = Field(0.5, ge=0.0)
    """Margin by which the chosen answer's reward is to win, for simpo and alphapo."""
    alpha: float = 0.0
    """Shape of the rewards that are compared, of any loss: (1 - p^-alpha) / alpha of the probability p, at 0 log p."""

    @model_validator(mode="before")
    @classmethod
    def _without_likelihood(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("loss_type") == "alphapo":
            return {"cpo_alpha": 0.0, **given}
        return given

    @model_validator(mode="after")
    def _sound(self, info: ValidationInfo) -> Self:
        if self.label_smoothing > 0 and self.loss_type in ("hinge", "ipo"):
            raise ValueError(f"label_smoothing: the loss {self.loss_type} does not know it; remove it")
        if self.simpo_gamma != 0.5 and self.loss_type not in ("simpo", "alphapo") and info.context != STORED:
            raise ValueError(
                f"simpo_gamma: the loss {self.loss_type} does not know it; remove it, or set loss_type to simpo"
            )
        if self.loss_type == "alphapo" and self.cpo_alpha > 0:
            raise ValueError("cpo_alpha: alphapo has no term of likelihood; remove it, or set loss_type to simpo")
        if self.loss_type == "alphapo" and self.alpha == 0:
            raise ValueError("alpha: alphapo at 0 is simpo; set alpha, such as to 0.25, or loss_type to simpo")
        return self


class BradleyTerryConfig(BaseModel):
    """A reward model gives the chosen answer the higher score (Bradley-Terry); a column `margin` says by how much."""

    model_config = CLOSED

    center_rewards_coefficient: float | None = Field(None, gt=0.0)
    """Weight of the squared sum of both scores, which keeps scores around 0 (arXiv 2312.09244); null leaves it out."""


PreferenceConfig = DpoConfig | KtoConfig | OrpoConfig | CpoConfig | BradleyTerryConfig


class OnlineDpoConfig(BaseModel):
    """Direct preference optimisation on pairs that the policy has sampled; `algorithm.beta` is its beta."""

    model_config = CLOSED

    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
