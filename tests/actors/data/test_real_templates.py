"""The chat templates that models are shipped with, as TRL keeps them, rendered with tokens that merge as theirs do."""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from actors.data.examples import ExampleStream
from actors.data.preferences import PairStream
from actors.data.prompts import prompt_ids
from tests.actors.data.families import MISTRAL
from tests.actors.data.test_chat import said, spans
from tests.actors.data.test_prompts import ListRows

TURNS = [
    said("user", "What is this?"),
    said("assistant", "This is\n\nthat.\n\n1. And so on."),
    said("user", "\nAnd then?\n\n"),
    said("assistant", "Then this is that."),
    said("user", "Is it?"),
    said("assistant", "It is, and \U0001f600 is it, too."),
]
TEXTS = [message["content"] + "\n\n" for message in TURNS] + ["user\n", "assistant\n", "system\n", "model\n"] * 9
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""What no merge crosses, in Llama 3 and Qwen: line breaks stay together, and with punctuation before them."""


@dataclass(frozen=True)
class Shipped:
    """A template of TRL's folder, or its text, the special tokens of its model's tokenizer, and what closes a turn."""

    template: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    closes: str
    opens: str = ""
    """Written ahead of the words of the last turn."""
    plain: tuple[str, ...] = ()
    """Tokens of their own that are words like others."""

    @property
    def num_bos(self) -> int:
        """Of a conversation; some templates write none, though text is given one."""
        return int(self.bos is not None and "bos_token" in self.tokenizer().chat_template)

    @cache  # noqa: B019 - a handful, for as long as the tests run
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Byte-level BPE with merges, line breaks among them; a BOS before every string where the family has one."""
        fast = Tokenizer(models.BPE())
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), byte_level])
        fast.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
        fast.train_from_iterator(TEXTS, trainer)
        fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in self.special])
        fast.add_tokens([AddedToken(token, normalized=False) for token in self.plain])
        if self.bos is not None:
            fast.post_processor = processors.TemplateProcessing(
                single=f"{self.bos} $A", special_tokens=[(self.bos, fast.token_to_id(self.bos))]
            )
        made = PreTrainedTokenizerFast(
            tokenizer_object=fast, bos_token=self.bos, eos_token=self.eos, clean_up_tokenization_spaces=False
        )
        made.chat_template = self.template if "{" in self.template else shipped(self.template)
        return made


def shipped(name: str) -> str:
    spec = find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return (Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja").read_text()


QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
PHI = ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
THINK = ("<think>", "</think>")

FAMILIES = {
    "Qwen 2.5": Shipped("qwen2_5", QWEN, None, "<|im_end|>", "<|im_end|>"),
    "Qwen 2.5 base": Shipped("qwen2_5", QWEN, None, "<|endoftext|>", "<|im_end|>"),
    "Qwen 3 instruct": Shipped("qwen3_instruct_2507", QWEN, None, "<|im_end|>", "<|im_end|>"),
    "Llama 3": Shipped("llama3", LLAMA, LLAMA[0], "<|eot_id|>", "<|eot_id|>"),
    "Llama 3.1": Shipped("llama3_1", LLAMA, LLAMA[0], "<|eot_id|>", "<|eot_id|>"),
    "Llama 3.2": Shipped("llama3_2", LLAMA, LLAMA[0], "<|eot_id|>", "<|eot_id|>"),
    "Phi 3": Shipped("phi3", PHI, "<s>", "<|endoftext|>", "<|end|>"),
    "Phi 3.5": Shipped("phi3_5", PHI, "<s>", "<|endoftext|>", "<|end|>"),
    "Gemma": Shipped("gemma", GEMMA, "<bos>", "<eos>", "<end_of_turn>"),
    "Gemma 3": Shipped("gemma3", GEMMA, "<bos>", "<eos>", "<end_of_turn>"),
    # TRL has none; the control tokens are those of its tokenizers from version 3 on.
    "Mistral": Shipped(MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", "</s>", opens=" "),
}
QWEN3 = Shipped("qwen3", QWEN, None, "<|im_end|>", "<|im_end|>", "<think>\n\n</think>\n\n", THINK)
"""Writes thoughts, were they empty, into the last turn alone."""
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def learned(family: Shipped, row: dict[str, Any]) -> list[str]:
    """The text of every run of tokens that is learned of a row, whose ids are those of the one rendering."""
    tokenizer = family.tokenizer()
    example = ExampleStream(ListRows((row,)), tokenizer, 0, False, 999, "messages" in row).example(0)
    token_ids = example.token_ids_T.tolist()
    talk = row.get("messages") or row["prompt"] + row["completion"]
    assert token_ids == tokenizer.apply_chat_template(talk)["input_ids"]
    assert token_ids.count(tokenizer.bos_token_id) == family.num_bos
    assert tokenizer.bos_token_id not in token_ids[1:]
    return spans(tokenizer, token_ids, example.loss_mask_T.tolist())


@families
def test_every_turn_of_the_assistant_is_learned_with_what_closes_it(family: Shipped) -> None:
    tokenizer = family.tokenizer()
    assert len(tokenizer(TURNS[1]["content"])["input_ids"]) < len(TURNS[1]["content"].encode()) * 0.6, "tokens merge"
    for length in (2, 4, 6):
        expected = [family.opens + message["content"] + family.closes for message in TURNS[1:length:2]]
        assert learned(family, {"messages": TURNS[:length]}) == expected
        assert learned(family, {"prompt": TURNS[:1], "completion": TURNS[1:length]}) == expected
        last = {"prompt": TURNS[: length - 1], "completion": TURNS[length - 1 : length]}
        assert learned(family, last) == expected[-1:]


PIECES = ["a", "this", ".", "1.", "\n", "\n\n", " ", "  ", "\t", "\u00e9", "\U0001f600", "<", "user", "[INST]"]


@given(data=st.data())
def test_whatever_is_said_is_learned_or_refused(data: st.DataObject) -> None:
    """To the token: nothing is lost at its ends, and nothing of its neighbours is taken for it."""
    family = FAMILIES[data.draw(st.sampled_from(sorted(FAMILIES)))]
    pieces = st.sampled_from([*PIECES, family.closes, family.eos])
    contents = data.draw(st.lists(st.lists(pieces, max_size=5).map("".join), min_size=4, max_size=4))
    talk = [said(turn["role"], content) for turn, content in zip(TURNS, contents, strict=False)]
    trims = "trim" in str(family.tokenizer().chat_template)
    expected = [family.opens + (text.strip() if trims else text) + family.closes for text in contents[1::2]]
    for row, wanted in (({"messages": talk}, expected), ({"prompt": talk[:3], "completion": talk[3:]}, expected[1:])):
        refusal = ""
        try:
            found = learned(family, row)
        except ValueError as error:
            refusal = str(error)
        if refusal:
            assert "blanks" in refusal
            assert any(content[:1].isspace() for content in contents)
        else:
            assert found == wanted


@families
def test_what_is_learned_follows_what_the_model_is_prompted_with(family: Shipped) -> None:
    tokenizer = family.tokenizer()
    given = prompt_ids(tokenizer, TURNS[:3], "row 0")
    row = {"prompt": TURNS[:3], "chosen": TURNS[3:4], "rejected": [said("assistant", "That.")]}
    for answers in (row, {side: TURNS[:3] + row[side] for side in ("chosen", "rejected")}):
        pair = PairStream(ListRows((answers,)), tokenizer, 0, False, 999).pair(0)
        for answer in (pair.chosen, pair.rejected):
            token_ids, mask = answer.token_ids_T.tolist(), answer.loss_mask_T.tolist()
            assert token_ids[: mask.index(True)] == given
            assert token_ids.count(tokenizer.bos_token_id) == family.num_bos


@families
def test_text_begins_with_one_bos(family: Shipped) -> None:
    tokenizer = family.tokenizer()
    row = {"prompt": "What is", "completion": " this"}
    token_ids = ExampleStream(ListRows((row,)), tokenizer, 0, False, 99).example(0).token_ids_T.tolist()
    assert token_ids.count(tokenizer.bos_token_id) == (family.bos is not None)
    assert tokenizer.decode(token_ids) == (family.bos or "") + "What is this" + family.eos


def test_thoughts_that_are_written_in_the_last_turn_alone() -> None:
    """The last turn can be learned behind any prompt; of earlier ones the model would learn not to think."""
    last = [QWEN3.opens + TURNS[3]["content"] + QWEN3.closes]
    assert learned(QWEN3, {"prompt": TURNS[:3], "completion": TURNS[3:4]}) == last
    assert learned(QWEN3, {"messages": TURNS[:2]}) == [QWEN3.opens + TURNS[1]["content"] + QWEN3.closes]
    for row in ({"messages": TURNS[:4]}, {"prompt": TURNS[:1], "completion": TURNS[1:4]}):
        with pytest.raises(ValueError, match=r"row 0: .* the assistant's message 1 differently when .* last turn into"):
            learned(QWEN3, row)


def test_a_thought_that_is_said_is_learned() -> None:
    thought = said("assistant", "<think>\nIs it?\n</think>\n\nIt is.")
    assert learned(QWEN3, {"prompt": TURNS[:1], "completion": [thought]}) == [thought["content"] + QWEN3.closes]


@pytest.mark.parametrize("name", ["deepseekv3", "deepseek_r1_distill"])
def test_a_prompt_that_begins_a_thought_which_no_turn_shows_is_refused(name: str) -> None:
    family = Shipped(name, DEEPSEEK, DEEPSEEK[0], DEEPSEEK[1], DEEPSEEK[1], plain=THINK)
    with pytest.raises(ValueError, match="row 0: the chat template renders the prompt differently when the completion"):
        learned(family, {"prompt": TURNS[:1], "completion": TURNS[1:2]})
    with pytest.raises(ValueError, match="row 0: the chat template begins the assistant's message 1 otherwise than it"):
        learned(family, {"messages": TURNS[:2]})


@pytest.mark.parametrize("name", ["qwen3_training", "phi3_training", "llama3_training"])
def test_a_template_that_marks_the_assistants_words_is_believed(name: str) -> None:
    """In all turns, and with the line break behind the closing token where its author wants it."""
    family = {"qwen3": QWEN3, "phi3": FAMILIES["Phi 3"], "llama3": FAMILIES["Llama 3"]}[name.split("_")[0]]
    marked = Shipped(name, family.special, family.bos, family.eos, family.closes, plain=family.plain)
    found = learned(marked, {"messages": TURNS})
    assert [text.split("</think>\n\n")[-1].split(family.closes)[0] for text in found] == [
        message["content"] for message in TURNS[1::2]
    ]
