"""Where the concept is TRL's, so is the default; docs/algorithms.md names the exceptions. The optimizer's are
GRPOConfig's for every kind of recipe, and what is not of mathematics (seed, dtype) is not looked at."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig
from trl.experimental.cpo import CPOConfig
from trl.experimental.gkd import GKDConfig
from trl.experimental.online_dpo import OnlineDPOConfig
from trl.experimental.orpo import ORPOConfig

from algorithms.config import GrpoConfig, OptimizerConfig
from algorithms.gkd import DistillationConfig
from algorithms.preference.config import (
    BradleyTerryConfig,
    CpoConfig,
    DpoConfig,
    KtoConfig,
    OnlineDpoConfig,
    OrpoConfig,
)

OTHERS = {
    "lr_scheduler_type": "`lr_scheduler_type` is `constant_with_warmup`, TRL's `linear`",
    "temperature": "`distillation.temperature` is 1.0",
}
"""What has another default, and how the docs tell it."""


def plain(default: Any) -> Any:
    """Lists are tuples, and no arguments are None."""
    return None if default == {} else tuple(default) if isinstance(default, list) else default


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (GrpoConfig, GRPOConfig),
        (OptimizerConfig, GRPOConfig),
        (DpoConfig, DPOConfig),
        (KtoConfig, KTOConfig),
        (OrpoConfig, ORPOConfig),
        (CpoConfig, CPOConfig),
        (BradleyTerryConfig, RewardConfig),
        (OnlineDpoConfig, OnlineDPOConfig),
        (DistillationConfig, GKDConfig),
    ],
)
def test_defaults_are_trls_but_for_those_that_the_docs_name(ours: type[BaseModel], theirs: type) -> None:
    docs = " ".join(Path("docs/algorithms.md").read_text().split())
    known = {field.name: field for field in dataclasses.fields(theirs)}
    shared = [name for name in ours.model_fields if name in known]
    assert shared
    for name in shared:
        default, made = known[name].default, known[name].default_factory
        expected = made() if made is not dataclasses.MISSING else default
        given = ours.model_fields[name].default
        assert (plain(given) == plain(expected)) is (name not in OTHERS), f"{ours.__name__}.{name}"
        assert name not in OTHERS or OTHERS[name] in docs
