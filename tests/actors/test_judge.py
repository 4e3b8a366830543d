"""A judge's verdict is a reward of 1 and one of 0, whichever completion it was shown first."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from actors.recipe.file import RecipeError, load_recipe
from actors.recipe.rewards import RewardConfig
from actors.reward import RewardActor
from actors.rewards.functions import JUDGE, RewardError, load, name_of
from actors.rewards.judge import as_reward, is_turned
from tests.actors.test_reward import group

ROOT = Path(__file__).parents[2]
ONLINE_DPO = str(ROOT / "recipes/methods/online_dpo.yaml")
PAIRS = [["a", "bb"], ["bb", "a"], ["ccc", "dd"], ["e", "ffff"]]


def longer(prompts: Sequence[str], pairs: Sequence[Sequence[str]]) -> list[int | None]:
    return [None if len(a) == len(b) else int(len(b) > len(a)) for a, b in pairs]


def asked(reward: Callable[..., Any], completions: list[str], **columns: Any) -> Any:
    return reward(prompts=["p", "p"], completions=completions, completion_ids=[[1], [2]], **columns)


@pytest.mark.parametrize("completions", PAIRS)
def test_the_better_one_has_the_reward(completions: list[str]) -> None:
    expected = [float(len(one) == max(map(len, completions))) for one in completions]
    assert asked(as_reward(longer), completions) == expected

    async def later(prompts: Any, pairs: Any) -> Any:
        return longer(prompts, pairs)

    assert asyncio.run(asked(as_reward(later), completions)) == expected


def test_no_verdict_is_no_reward() -> None:
    assert asked(as_reward(longer), ["aa", "bb"]) == [None, None]


def test_a_judge_that_prefers_the_first_place_prefers_nobody() -> None:
    texts = [[f"one {n}", f"other {n}"] for n in range(200)]
    first = as_reward(lambda prompts, pairs: [0])
    won = sum(asked(first, pair)[0] for pair in texts)
    assert 70 < won < 130
    assert won == sum(not is_turned(pair) for pair in texts)


def test_a_judge_gets_the_columns_that_it_names() -> None:
    seen: dict[str, Any] = {}

    def judge(prompts: Any, pairs: Any, answer: Any) -> list[int]:
        seen.update(prompts=prompts, pairs=pairs, answer=answer)
        return [0]

    asked(as_reward(judge), ["a", "b"], answer=["yes", "yes"], level=[3, 3])
    assert seen["prompts"] == ["p"]
    assert seen["answer"] == ["yes"]
    assert sorted(seen["pairs"][0]) == ["a", "b"]


@pytest.mark.parametrize("verdict", [[2], [True], ["0"], 0, [0, 1], [0.5], None])
def test_anything_else_is_told(verdict: Any) -> None:
    with pytest.raises(ValueError, match=r"a judge (says 0, 1 or None|returns a list)"):
        asked(as_reward(lambda prompts, pairs: verdict), ["a", "b"])


def test_three_completions_are_no_pair() -> None:
    with pytest.raises(ValueError, match="a judge compares two completions of a prompt, not 3"):
        asked(as_reward(longer), ["a", "b", "c"])


def test_a_judge_is_loaded_by_its_own_signature() -> None:
    source = f"{JUDGE}{ROOT}/recipes/rewards/nearer_answer.py:nearer_answer"
    assert name_of(source) == "nearer_answer"
    scores = asked(load(source, ["answer", "other"]), ["cat", "cot"], answer=["cat", "cat"])
    assert scores == [1.0, 0.0]
    with pytest.raises(RewardError, match="its parameter 'answer' is no column"):
        load(source, ["other"])
    with pytest.raises(RewardError, match="cannot take the keywords pairs"):
        load(f"{JUDGE}{__file__}:scores")


def scores(prompts: Any) -> None:
    """No judge."""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.num_generations=4"], "a judge compares two completions, and algorithm.num_generations is 4"),
        (["algorithm.beta=0.0"], "algorithm.beta: 0 would let online_dpo go as far"),
        (["staleness.when_stale=mask"], "staleness.when_stale: 'mask' takes single tokens out"),
        (["algorithm.loss_type=grpo"], "algorithm.loss_type: it has no effect beside online_dpo"),
        (["health.rules=[{kind: kl}]"], "health.rules: the rule 'kl' looks at a metric that is not measured beside"),
        (["online_dpo.loss_type=hinge"], "online_dpo.loss_type: 'hinge'"),
        (["rewards.functions.0.function=x.py:f"], "write either function"),
        (["distillation={}", "reference={kind: pretrained, path: a}"], "a step has one loss"),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(ONLINE_DPO, overrides)
    assert message in str(error.value)


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_judge_that_raises_is_told_by_its_own_line(tmp_path: Path, kind: str) -> None:
    (tmp_path / "mine.py").write_text(f"import json\n\n{kind} judge(prompts, pairs):\n    return json.loads('no')\n")
    actor = RewardActor((RewardConfig(judge=f"{tmp_path}/mine.py:judge"),), 30.0)
    try:
        (told,) = asyncio.run(actor.score(group(), ["a", "b"])).details
    finally:
        actor.close()
    assert "mine.py, line 4: JSONDecodeError" in told
