"""The tables in docs/ have every method of the shelf, each with a formula, a source and a figure that a test holds."""

import re
from pathlib import Path

import pytest

from tests.actors.model.test_sft_parity import TOLERANCE as OF_SFT
from tests.algorithms.test_gae import OF_FLOAT32 as OF_PPO

ROOT = Path(__file__).parents[3]
FIGURE = re.compile(r"\b1e-\d+\b")
ON_THE_LOOP = {
    "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo",
    "online_dpo", "gkd", "on_policy_distillation", "dual_clip", "entropy_bonus", "decoupled_ppo", "truncated_is",
    "icepop", "geometric_mask",
}  # fmt: skip
FROM_DATA = (
    "kind: dpo", "loss_type: sigmoid_norm", "loss_type: ipo", "loss_type: hinge", "loss_type: robust", "kind: kto",
    "kind: orpo", "kind: cpo", "loss_type: simpo", "kind: reward",
)  # fmt: skip


def rows(file: str, header: str) -> list[list[str]]:
    """The cells of the table below this header."""
    _, _, below = (ROOT / "docs" / file).read_text().partition(f"{header}\n")
    table = below.partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in table]


ONLINE = rows("algorithms.md", "| recipe | what it is | source | keys that make it | paper | TRL |")
OFFLINE = rows("offline.md", "| method | loss of a pair | source | in a recipe | parity |")


def test_every_method_on_the_loop_is_there() -> None:
    names = {re.sub(r"^\[`(\w+)`\].*", r"\1", row[0]) for row in ONLINE}
    assert names == {path.stem for path in (ROOT / "recipes/methods").glob("*.yaml")} | {"sft"}
    assert names > ON_THE_LOOP


@pytest.mark.parametrize("key", FROM_DATA)
def test_every_method_on_data_is_there(key: str) -> None:
    assert any(key in row[3] for row in OFFLINE)


@pytest.mark.parametrize("row", ONLINE, ids=lambda row: row[0].partition("]")[0])
def test_a_method_on_the_loop_has_all_that_it_must(row: list[str]) -> None:
    _, formula, source, keys, paper, trl = row
    assert len(formula) >= 10
    assert len(source) > 1
    assert "`" in keys
    figures = [float(figure) for cell in (paper, trl) for figure in FIGURE.findall(cell)]
    assert figures
    assert max(figures) <= 1e-5


@pytest.mark.parametrize("row", OFFLINE, ids=lambda row: row[3])
def test_a_method_on_data_has_all_that_it_must(row: list[str]) -> None:
    _, formula, source, keys, parity = row
    assert len(formula) >= 10
    assert re.search(r"\d{4}\.\d{5}", source)
    assert "`" in keys
    assert float(parity) <= 1e-5


@pytest.mark.parametrize(("method", "held"), [("sft", OF_SFT), ("ppo", OF_PPO)])
def test_figures_that_no_other_test_reads_are_those_of_theirs(method: str, held: float) -> None:
    """All others are read by the tests that hold them."""
    (trl,) = (row[5] for row in ONLINE if row[0].startswith(f"[`{method}`]"))
    assert [float(figure) for figure in FIGURE.findall(trl)] == [held]
