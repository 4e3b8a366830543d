"""`train` refuses preferences that it could not learn from: exit code 2, one message with the fix, no traceback."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deploy.__main__ import app

PAIR = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
JUDGED = {"prompt": "1+1=", "completion": "2", "label": True}
RECIPE = """
kind: {kind}
name: case
steps: 1
batch_size: 4
max_length: 64
model: {{kind: tiny}}
dataset: {{path: {folder}/rows.jsonl}}
run_dir: {folder}/run
pools: {{policy: {{cpus_per_worker: 0.25}}}}
"""

# kind, rows, overrides -> what the message must say.
CASES: dict[str, tuple[str, list[dict[str, Any]], list[str], list[str]]] = {
    "the same answers": ("dpo", [PAIR, {**PAIR, "rejected": "2"}], [], ["rows.jsonl: row 1", "remove the row"]),
    "no rejected": ("orpo", [{"prompt": "a", "chosen": "b"}], [], ["no column 'rejected'", "rename"]),
    "a pair too long": ("cpo", [{**PAIR, "rejected": "x" * 99}], [], ["row 0: rejected", "raise max_length to 104"]),
    "no label": ("kto", [{"prompt": "a", "completion": "b"}], [], ["no column 'label'"]),
    "a label in words": ("kto", [JUDGED, {**JUDGED, "label": None}], [], ["row 1: 'label' must be true"]),
    "pairs for KTO": ("kto", [PAIR], [], ["no column 'completion'"]),
    "judgements for DPO": ("dpo", [JUDGED], [], ["no column 'chosen'"]),
    "a margin in words": ("reward", [{**PAIR, "margin": "much"}], [], ["row 0: 'margin' must be a number"]),
    "conversations without the key": (
        "sft",
        [{"messages": [{"role": "user", "content": "a"}]}],
        [],
        ["no column 'prompt'", "assistant_only_loss: true"],
    ),
    "nothing said": (
        "sft",
        [{"messages": [{"role": "user", "content": "a"}]}],
        ["assistant_only_loss=true"],
        ["row 0: the assistant says nothing"],
    ),
    "no such template": ("dpo", [PAIR], ["model.chat_template=none.jinja"], ["model.chat_template: there is no file"]),
    "longer than the model": ("dpo", [PAIR], ["max_length=999"], ["max_length: 999", "256 positions"]),
    "no such loss": ("dpo", [PAIR], ["algorithm.loss_type=sigmoit"], ["algorithm.loss_type", "choose from sigmoid"]),
    "no such loss of CPO": ("cpo", [PAIR], ["algorithm.loss_type=sigmoit"], ["loss_type", "did you mean 'sigmoid'"]),
    "a key of another kind": ("orpo", [PAIR], ["algorithm.cpo_alpha=1"], ["algorithm.cpo_alpha: unknown key"]),
    "one judgement at a time": ("kto", [JUDGED], ["batch_size=1"], ["batch_size: 1", "apo_zero_unpaired"]),
    "more ranks than pairs": ("dpo", [PAIR], ["pools.policy.num_workers=5"], ["cannot feed 5 policy ranks"]),
    "dropout": ("dpo", [PAIR], ["policy.lora={lora_dropout: 0.1}"], ["lora_dropout", "kind 'sft' may have it"]),
    "adapters for a reward model": ("reward", [PAIR], ["policy.lora={}"], ["policy.lora", "remove lora"]),
    "bad rows set aside": ("dpo", [PAIR], ["dataset.max_bad_rows=1"], ["max_bad_rows"]),
}


@pytest.mark.parametrize(("kind", "rows", "overrides", "expected"), CASES.values(), ids=CASES)
def test_what_cannot_work_is_refused(
    tmp_path: Path, kind: str, rows: list[dict[str, Any]], overrides: list[str], expected: list[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(kind=kind, folder=tmp_path))
    found = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml"), *overrides])
    assert found.exit_code == 2, found.output
    said = " ".join(found.output.split())
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()
    for part in expected:
        assert part in said, said


def test_a_reward_model_that_is_none_is_refused(tmp_path: Path) -> None:
    override = f"rewards.functions=[{{model: {tmp_path}/none/model}}]"
    found = CliRunner().invoke(app, ["train", "recipes/demo_sft.yaml", "kind=grpo", override])
    assert found.exit_code == 2
    found = CliRunner().invoke(app, ["train", "recipes/demo.yaml", override, f"run_dir={tmp_path}/run"])
    assert found.exit_code == 2, found.output
    assert "rewards.functions: model: there is no folder" in " ".join(found.output.split())
