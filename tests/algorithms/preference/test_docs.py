"""docs/offline.md lists every loss, with the agreement that the test of parity holds it to."""

from pathlib import Path
from typing import get_args

from algorithms.preference.config import CpoConfig, DpoLoss, KtoConfig
from tests.algorithms.preference.test_trl_parity import FLOAT32, TOLERANCE

ROWS = [line for line in Path("docs/offline.md").read_text().splitlines() if line.startswith("|") and "`" in line]


def test_every_loss_is_listed() -> None:
    names = {*get_args(DpoLoss), *get_args(KtoConfig.model_fields["loss_type"].annotation)}
    names |= set(get_args(CpoConfig.model_fields["loss_type"].annotation)) | {"dpo", "kto", "orpo", "cpo", "reward"}
    table = "\n".join(ROWS)
    missing = {name for name in names if name not in table} - {"sigmoid"}
    assert not missing


def test_the_parity_that_is_told_is_the_one_that_is_tested() -> None:
    told = [row.rstrip("| ").rpartition("| ")[2] for row in ROWS if "1e-" in row]
    assert len(told) == 22
    in_float32 = ["orpo" in row.lower() for row in ROWS if "1e-" in row]
    tolerances = [FLOAT32 if rounded else TOLERANCE for rounded in in_float32]
    assert told == [f"{tolerance:.0e}".replace("e-0", "e-") for tolerance in tolerances]
