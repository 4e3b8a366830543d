"""A reward function is called where it will run; what it does there that it should not is told."""

import time
from pathlib import Path
from typing import Any

import pytest

from deploy.doctor.check import Finding
from deploy.doctor.rewards import check_reward_function, judged, own_answer
from tests.deploy.doctor.recipes import ROWS, recipe_of

FUNCTIONS = """
import itertools, os, time

count = itertools.count()

def exact(completions, answer, **kwargs):
    return [float(said == right) for said, right in zip(completions, answer)]

def inverted(completions, answer, **kwargs):
    return [-float(said == right) for said, right in zip(completions, answer)]

def ids(completion_ids, **kwargs):
    return [float(len(each)) for each in completion_ids]

def raises(completions, **kwargs):
    return [1 / 0 for _ in completions]

def hangs(completions, **kwargs):
    time.sleep(600)

def dies(completions, **kwargs):
    os._exit(3)

def nothing(completions, **kwargs):
    return [None for _ in completions]

def changes(completions, **kwargs):
    return [float(next(count)) for _ in completions]

def too_few(completions, **kwargs):
    return [1.0]

def wants_much(completions, **kwargs):
    raise MemoryError

def wrong_column(completions, solution, **kwargs):
    return [0.0 for _ in completions]
"""


def found_of(folder: Path, name: str, *overrides: str) -> Finding:
    (folder / "rewards.py").write_text(FUNCTIONS)
    functions = f"rewards.functions=[{{function: '{folder}/rewards.py:{name}'}}]"
    return check_reward_function(recipe_of(folder, functions, *overrides), 0)


def test_a_good_function_is_told_with_what_it_gave(tmp_path: Path) -> None:
    assert found_of(tmp_path, "exact") == Finding(
        "pass", "exact: 1, 1 for the first rows' own answers, 0, 0 for empty ones"
    )


def test_a_function_sees_the_tokens_of_the_policys_tokenizer(tmp_path: Path) -> None:
    """One token a byte, and EOS."""
    assert "ids: 2, 2 for the first rows' own answers, 1, 1 for empty ones" in found_of(tmp_path, "ids").text


@pytest.mark.parametrize(
    ("name", "level", "said"),
    [
        ("raises", "fail", "exception: "),
        ("dies", "fail", "exit status 3"),
        ("too_few", "fail", "bad_output: returned 1 scores for 2 completions"),
        ("wrong_column", "fail", "solution"),
        ("missing", "fail", "defines no 'missing'"),
        ("nothing", "warn", "nothing gives no score to 2 rows"),
        ("changes", "warn", "changes gives 0, 1 and then 4, 5 for the same completions"),
        ("inverted", "warn", "-1, -1 for the first rows' own answers"),
    ],
)
def test_a_function_that_would_spoil_a_run_is_told(tmp_path: Path, name: str, level: str, said: str) -> None:
    found = found_of(tmp_path, name)
    assert (found.level, said in found.line) == (level, True), found


def test_a_function_that_hangs_is_killed_at_its_deadline(tmp_path: Path) -> None:
    started = time.monotonic()
    found = found_of(tmp_path, "hangs", "rewards.timeout_s=0.5")
    assert time.monotonic() - started < 30
    assert found.level == "fail"
    assert "hangs: timeout: took more than 0.5 s" in found.text
    assert "rewards.timeout_s" in found.fix


def test_memory_is_raised_where_there_is_a_limit_to_raise(tmp_path: Path) -> None:
    limited = found_of(tmp_path, "wants_much", "rewards.max_memory_gb=8")
    assert "memory: " in limited.text
    assert "raise rewards.max_memory_gb" in limited.fix
    free = found_of(tmp_path, "wants_much")
    assert (free.level, "memory: " in free.text) == ("fail", True)
    assert free.fix.startswith("let it take less: rewards.max_memory_gb sets no limit")


def test_conversations_are_given_as_trl_gives_them(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "2+2?"}], "answer": "4"}]
    (tmp_path / "talk.py").write_text(
        "def talk(prompts, completions, **kwargs):\n"
        "    said = [(p[0]['role'], c[0]['role']) for p, c in zip(prompts, completions)]\n"
        "    return [float(roles == ('user', 'assistant')) for roles in said]\n"
    )
    recipe = recipe_of(tmp_path, f"rewards.functions=[{{function: '{tmp_path}/talk.py:talk'}}]", rows=rows)
    assert check_reward_function(recipe, 0).text == "talk: 1 for '42', 1 for empty ones"


def test_a_reward_model_that_is_none_is_told(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    recipe = recipe_of(tmp_path, f"rewards.functions=[{{model: {tiny_models['tied']}}}]")
    with pytest.raises(ValueError, match="is a Qwen3ForCausalLM"):
        check_reward_function(recipe, 0)


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        (ROWS[0], "4"),
        ({"completion": [{"role": "assistant", "content": "four"}]}, "four"),
        ({"completion": []}, None),
        ({"completion": ""}, None),
    ],
    ids=str,
)
def test_a_rows_own_answer_is_its_completion(row: dict[str, Any], answer: str | None) -> None:
    assert own_answer(row) == answer


def test_scores_that_are_missing_do_not_count() -> None:
    assert judged("f", [(None, 0.0), (1.0, None), (None, 0.0)], has_answers=True).level == "pass"
    assert judged("f", [(0.0, 1.0), (None, None), (0.0, 1.0)], has_answers=True).level == "warn"


def test_completions_that_are_made_up_need_not_be_better_than_none() -> None:
    assert judged("f", [(0.0, 1.0), (0.0, 1.0), (0.0, 1.0)], has_answers=False).level == "pass"
