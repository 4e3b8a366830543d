"""A reward model's score of a packed sequence is the one that transformers gives the sequence alone, padded or not."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    Qwen3Config,
)

from actors.model import segments
from actors.model.forward import PACKED_ATTENTION, row_logprobs, row_scores, row_values
from actors.model.load import disable_dropout, load_scorer
from actors.model.tiny import byte_tokenizer, make_tiny_model
from actors.recipe.model import TinyModel
from algorithms.packed import PackedRow, pack_row
from algorithms.types import Rollout
from tests.actors.model.test_forward import SIZES, group, rollout, rollouts

TINY = TinyModel(kind="tiny", hidden_size=64, num_layers=2, num_heads=2, tie_word_embeddings=True)


def ends() -> list[Rollout]:
    return [replace(r, loss_mask_T=np.arange(r.num_tokens) == r.num_tokens - 1) for r in rollouts()]


def test_scores_of_a_packed_row(tmp_path: Path) -> None:
    make_tiny_model(TINY, tmp_path / "model", seed=0)
    torch.manual_seed(0)
    scorer = load_scorer(str(tmp_path / "model"), None, False, "float32", PACKED_ATTENTION).eval()
    scorer.save_pretrained(tmp_path / "scorer")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "scorer").eval()
    made = ends()
    with torch.no_grad():
        together = row_scores(scorer, pack_row(made, [0.0] * len(made), pad_id=0))
        alone = [plain(torch.from_numpy(r.token_ids_T.astype(np.int64))[None]).logits[0, 0] for r in made]
        pad = byte_tokenizer(256).pad_token_id
        longest = max(r.num_tokens for r in made)
        padded = [np.pad(r.token_ids_T, (0, longest - r.num_tokens), constant_values=pad) for r in made]
        batched = plain(torch.from_numpy(np.stack(padded).astype(np.int64))).logits[:, 0]
    assert torch.allclose(together, torch.stack(alone), atol=1e-6)
    assert torch.allclose(together, batched, atol=1e-6)
    assert together.std() > 1e-3, "the scores must not be all alike"


def test_the_value_before_a_token_knows_what_came_before_and_nothing_else(tmp_path: Path) -> None:
    make_tiny_model(TINY, tmp_path / "model", seed=0)
    torch.manual_seed(0)
    critic = load_scorer(str(tmp_path / "model"), None, False, "float32", PACKED_ATTENTION).eval()
    made = rollouts()
    with torch.no_grad():
        row = pack_row(made, [0.0] * len(made), pad_id=0)
        together_N = row_values(critic, row)
        for number, rollout in enumerate(made):
            every_place = replace(rollout, loss_mask_T=np.arange(rollout.num_tokens) > 0)
            alone_T = row_scores(critic, pack_row([every_place], [0.0], pad_id=0))
            first = int(np.flatnonzero(rollout.loss_mask_T)[0])
            values_L = together_N[row.sequence_N == number]
            if first > 1:  # the score at a token is the value of the token behind it
                assert torch.allclose(values_L, alone_T[first - 2 : -1], atol=1e-6)
    assert together_N.std() > 1e-3, "the values must not be all alike"


def shared_prompts() -> list[Rollout]:
    """Two groups, and a sequence between them that shares nothing."""
    return [*group(7, (9, 1, 3, 20)), rollout(4, 5), *group(3, (2, 30, 6))]


def shared_but_for_the_end() -> list[Rollout]:
    """Scored at the end alone, as a reward model's are: what a sequence shares is all but its last token."""
    made = [*group(7, (1, 1)), rollout(4, 5), *group(12, (1, 1, 1))]
    made[1].token_ids_T[-1] = 5
    made[4].token_ids_T[-1] = 6
    return [replace(r, loss_mask_T=np.arange(r.num_tokens) == r.num_tokens - 1) for r in made]


@pytest.mark.parametrize("devices", [segments.ONE_BY_ONE, ()], ids=["one by one", "in grids"])
@pytest.mark.parametrize("made", [shared_prompts(), shared_but_for_the_end()], ids=["prompts", "all but the end"])
@pytest.mark.parametrize("numbers", [row_scores, row_values])
def test_a_prompt_that_is_shared_changes_no_score_no_value_and_no_gradient(
    numbers: Callable[[Any, PackedRow], torch.Tensor],
    made: list[Rollout],
    devices: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(segments, "ONE_BY_ONE", devices)
    monkeypatch.setattr(segments, "SHORT", 4)
    make_tiny_model(TINY, tmp_path / "model", seed=0)
    torch.manual_seed(0)
    together = load_scorer(str(tmp_path / "model"), None, False, "float32", PACKED_ATTENTION)
    apart = copy.deepcopy(together)
    row = pack_row(made, [0.0] * len(made), pad_id=0)
    assert sum(row.shared_S) == sum(each.num_tokens for each in made) - len(row.token_ids_T) > 0
    alone = [pack_row([each], [0.0], pad_id=0) for each in made]
    weights_N = torch.linspace(-1.0, 1.0, len(row.targets_N))
    together_N = numbers(together, row)
    (together_N * weights_N).sum().backward()
    alone_N = torch.cat([numbers(apart, each) for each in alone])
    (alone_N * weights_N).sum().backward()
    torch.testing.assert_close(together_N, alone_N, rtol=1e-4, atol=1e-5)
    assert together_N.std() > 1e-3, "the numbers must not be all alike"
    wanted = dict(apart.named_parameters())
    for name, parameter in together.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-3, atol=1e-4, msg=name)


def test_a_row_without_sequences_still_has_a_gradient(tmp_path: Path) -> None:
    make_tiny_model(TINY, tmp_path / "model", seed=0)
    scorer = load_scorer(str(tmp_path / "model"), None, False, "float32", PACKED_ATTENTION)
    scores = row_scores(scorer, pack_row([], [], pad_id=0))
    assert scores.shape == (0,)
    scores.sum().backward()
    missing = [name for name, parameter in scorer.named_parameters() if parameter.grad is None]
    assert not missing


def test_a_model_without_such_a_head_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(**sizes, intermediate_size=32)).save_pretrained(tmp_path / "model")
    byte_tokenizer(64).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="another head than one linear layer 'score'; choose a decoder"):
        load_scorer(str(tmp_path / "model"), None, False, "float32", "eager")


def test_without_dropout_training_gives_what_evaluation_gives(tmp_path: Path) -> None:
    config = Qwen3Config(**SIZES, attention_dropout=0.5)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION).train()
    model.model.embed_tokens = torch.nn.Sequential(model.model.embed_tokens, torch.nn.Dropout(0.5))
    made = rollouts()
    row = pack_row(made, [0.0] * len(made), pad_id=0)

    def twice() -> list[torch.Tensor]:
        return [row_logprobs(model, row, 1.0)[0] for _ in range(2)]

    assert not torch.equal(*twice())
    disable_dropout(model)
    assert torch.equal(*twice())
    assert torch.equal(twice()[0], row_logprobs(model.eval(), row, 1.0)[0])
