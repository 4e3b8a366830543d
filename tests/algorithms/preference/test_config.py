"""A setting that a loss does not know is refused, never ignored."""

from typing import Any

import pytest
from pydantic import ValidationError

from algorithms.preference.config import CpoConfig, DpoConfig

REFUSED: dict[str, tuple[type, dict[str, Any], str]] = {
    "no such loss": (DpoConfig, {"loss_type": "sigmoit"}, "there is no loss 'sigmoit'; choose from sigmoid"),
    "no list of names": (DpoConfig, {"loss_type": 3}, "write the name of a loss"),
    "nothing": (DpoConfig, {"loss_type": []}, "at least 1 item"),
    "weights for others": (DpoConfig, {"loss_weights": (1.0, 2.0)}, "2 weights for 1 losses"),
    "EXO without noise": (DpoConfig, {"loss_type": "exo_pair"}, "infinite at 0"),
    "noise for a loss without": (DpoConfig, {"label_smoothing": 0.1}, "only exo_pair, robust, aot, aot_unpaired"),
    "a divergence for a loss without": (
        DpoConfig,
        {"loss_type": ["sigmoid", "nca_pair"], "f_divergence_type": "forward_kl"},
        "only sigmoid, .* know forward_kl",
    ),
    "AlphaPO of no shape": (CpoConfig, {"loss_type": "alphapo"}, "alpha: alphapo at 0 is simpo; set alpha"),
    "AlphaPO with likelihood": (
        CpoConfig,
        {"loss_type": "alphapo", "alpha": 0.25, "cpo_alpha": 1.0},
        "cpo_alpha: alphapo has no term of likelihood; remove it",
    ),
    "a temperature for another loss": (DpoConfig, {"discopop_tau": 0.1}, "discopop_tau: only discopop knows it"),
    "a margin for another loss": (CpoConfig, {"simpo_gamma": 1.0}, "simpo_gamma: the loss sigmoid does not know it"),
    "noise for the hinge": (CpoConfig, {"loss_type": "hinge", "label_smoothing": 0.1}, "hinge does not know it"),
}


@pytest.mark.parametrize(("kind", "values", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_have_no_effect_is_refused(kind: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        kind(**values)


def test_one_loss_or_a_list_of_losses() -> None:
    assert DpoConfig(loss_type="ipo").weighted == (("ipo", 1.0),)
    summed = DpoConfig(loss_type=["sigmoid", "sft"], loss_weights=(1.0, 0.5))
    assert summed.weighted == (("sigmoid", 1.0), ("sft", 0.5))


def test_alphapo_has_no_likelihood_and_is_read_as_it_is_written() -> None:
    config = CpoConfig(loss_type="alphapo", alpha=0.25)
    assert config.cpo_alpha == 0.0
    assert CpoConfig.model_validate_json(config.model_dump_json(), strict=True) == config
