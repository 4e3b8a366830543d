"""A reward model is a reward function like any other, and gives the score that it was trained to give."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification

from actors.data.examples import answered
from actors.data.preferences import PairStream
from actors.data.prompts import prompt_ids
from actors.model.forward import PACKED_ATTENTION, row_scores
from actors.model.load import load_scorer, load_tokenizer
from actors.model.tiny import make_tiny_model
from actors.recipe.model import TinyModel
from actors.recipe.rewards import RewardConfig
from actors.reward import RewardActor
from actors.rewards.classifier import _token_ids, check_reward_model, reward_model
from actors.rewards.functions import name_of
from actors.run.preference import _end
from algorithms.packed import pack_row
from algorithms.types import Group, Messages, Prompt
from tests.actors.data.test_prompts import ListRows
from tests.actors.data.test_real_templates import FAMILIES

TALK = [{"role": "user", "content": "hi"}]
ROWS: tuple[dict[str, Any], ...] = (
    {"prompt": "1+1=", "chosen": "2", "rejected": "three"},
    {
        "prompt": TALK,
        "chosen": [{"role": "assistant", "content": "ho"}],
        "rejected": [{"role": "assistant", "content": ""}],
    },
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model as a run leaves it, in `runs/judge/model`."""
    base = tmp_path_factory.mktemp("models")
    make_tiny_model(TinyModel(kind="tiny", hidden_size=64, num_layers=1, num_heads=1), base / "base", seed=3)
    torch.manual_seed(3)
    scorer = load_scorer(str(base / "base"), None, False, "float32")
    left = base / "judge/model"
    scorer.save_pretrained(left)
    load_tokenizer(str(base / "base"), None, False).save_pretrained(left)
    return left


def trained_on(folder: Path, row: dict[str, Any]) -> list[float]:
    """The scores of chosen and rejected, as the policy's ranks compute them."""
    stream = PairStream(ListRows((row,)), load_tokenizer(str(folder), None, False), 0, False, 200)
    pair = stream.pair(0)
    ends = [_end(answer, int(stream.tokenizer.pad_token_id or 0)) for answer in (pair.chosen, pair.rejected)]
    scorer = load_scorer(str(folder), None, False, "float32", PACKED_ATTENTION).eval()
    with torch.no_grad():
        return list(row_scores(scorer, pack_row(ends, [0.0, 0.0], pad_id=0)).tolist())


@pytest.mark.parametrize("row", ROWS, ids=["text", "conversation"])
def test_what_is_served_is_what_was_trained(folder: Path, row: dict[str, Any]) -> None:
    scores = reward_model(str(folder))(
        prompts=[row["prompt"]] * 2,
        completions=[row["chosen"], row["rejected"]],
        completion_ids=[[1], [2]],
        answer=[0, 0],
    )
    assert scores == pytest.approx(trained_on(folder, row), abs=1e-5)
    assert abs(scores[0] - scores[1]) > 1e-4, "the scores must not be all alike"


def test_scores_do_not_depend_on_who_is_scored_together(folder: Path) -> None:
    scores = reward_model(str(folder))
    texts = ["x" * n for n in range(1, 40)]
    together = scores(prompts=["say "] * 39, completions=texts)
    alone = [scores(prompts=["say "], completions=[text])[0] for text in texts]
    assert together == pytest.approx(alone, abs=1e-5)


async def test_a_reward_worker_serves_it(folder: Path) -> None:
    actor = RewardActor((RewardConfig(model=str(folder), weight=2.0),), timeout_s=60.0)
    try:
        await actor.check()
        prompt = Prompt(0, 0, (1,), ROWS[0]["prompt"], {"answer": "2"})
        rollouts = PairStream(ListRows(ROWS[:1]), load_tokenizer(str(folder), None, False), 0, False, 200).pair(0)
        scored = await actor.score(Group(prompt, (rollouts.chosen, rollouts.rejected), 0, 0), ["2", "three"])
    finally:
        actor.close()
    expected = trained_on(folder, ROWS[0])
    assert scored.failures == {}
    assert scored.scores == {"judge": pytest.approx(expected, abs=1e-5)}
    assert scored.rewards_G == pytest.approx([2 * score for score in expected], abs=1e-5)


def test_names() -> None:
    sources = {"runs/judge/model": "judge", "org/judge-7b": "judge-7b", "/models/model": "models", "model": "model"}
    for path, name in sources.items():
        assert name_of(RewardConfig(model=path).source) == name


def test_other_models_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rewards.functions: model: '.*base' is a Qwen3ForCausalLM with 2 labels"):
        check_reward_model(str(folder.parents[1] / "base"))
    with pytest.raises(ValueError, match=r"rewards.functions: model: there is no folder"):
        check_reward_model(str(tmp_path / "none/model"))
    two = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, ignore_mismatched_sizes=True)
    two.save_pretrained(tmp_path / "two")
    load_tokenizer(str(folder), None, False).save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="with 2 labels, and a reward model is a sequence classifier with one"):
        check_reward_model(str(tmp_path / "two"))


@pytest.mark.parametrize("values", [{}, {"function": "a:b", "model": "c"}, {"weight": 2.0}])
def test_a_reward_is_a_function_or_a_model(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"write either function: .* or model: "):
        RewardConfig.model_validate_json(json.dumps(values))


@pytest.mark.parametrize("family", ["Qwen 2.5", "Qwen 3 instruct", "Phi 3"])
def test_line_breaks_that_merge_with_the_templates_are_left_out(family: str) -> None:
    """A sampled answer may begin with them, though no row of the data may."""
    tokenizer = FAMILIES[family].tokenizer()
    odd, plain = ([{"role": "assistant", "content": text}] for text in ("\n\nho", "ho"))
    with pytest.raises(ValueError, match="the completion cannot be told from the prompt"):
        answered(tokenizer, TALK, prompt_ids(tokenizer, TALK, "row"), odd, "row")
    assert _token_ids(tokenizer, TALK, odd) == _token_ids(tokenizer, TALK, plain)
    assert (
        _token_ids(tokenizer, TALK, plain)
        == answered(tokenizer, TALK, prompt_ids(tokenizer, TALK, "row"), plain, "row")[0]
    )


def test_a_conversation_of_the_rollouts_prompt_is_continued(folder: Path) -> None:
    """Messages come as GRPO hands them over."""
    said: Messages = [{"role": "assistant", "content": "ho"}]
    (score,) = reward_model(str(folder))(prompts=[TALK], completions=[said])
    assert score == pytest.approx(trained_on(folder, ROWS[1])[0], abs=1e-5)
