"""`example(ordinal)` is a pure function, and its loss is on the completion alone, the end of sequence included."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from actors.data.dataset import Rows, prompt_of
from actors.data.prompts import conversation_ids, prompt_ids, text_ids
from algorithms.order import row_of
from algorithms.types import Messages, Rollout


@dataclass(frozen=True)
class ExampleStream:
    """Prompt-completion rows as sequences to learn from, by ordinal, each at most `max_length` tokens."""

    rows: Rows
    tokenizer: PreTrainedTokenizerBase
    seed: int
    shuffle: bool
    max_length: int

    def __post_init__(self) -> None:
        if "completion" not in self.rows.column_names:
            raise ValueError(
                f"dataset.path: {self.rows.source} has no column 'completion', which supervised fine-tuning learns; "
                f"its columns are {', '.join(self.rows.column_names)}; rename the one that holds the completion"
            )

    def example(self, ordinal: int) -> Rollout:
        """The example of an ordinal as a rollout that nobody sampled: no version spans, log-probabilities 0."""
        _, index = row_of(ordinal, len(self.rows), self.seed, self.shuffle)
        return self._example_of_row(index)

    def preflight(self, num_rows: int = 256) -> None:
        """The first rows (all rows when fewer) make examples, so bad data is a ValueError before GPUs are started."""
        for index in range(min(num_rows, len(self.rows))):
            self._example_of_row(index)

    def _example_of_row(self, index: int) -> Rollout:
        where = f"{self.rows.source}: row {index}"
        row = self.rows.row(index)
        prompt, completion = prompt_of(row, "prompt", where), prompt_of(row, "completion", where)
        given_ids = prompt_ids(self.tokenizer, prompt, where)
        learned_ids = completion_ids(self.tokenizer, prompt, given_ids, completion, where)
        num_tokens = len(given_ids) + len(learned_ids)
        if num_tokens > self.max_length:
            raise ValueError(
                f"{where}: prompt and completion have {num_tokens} tokens, max_length allows {self.max_length}; raise "
                f"max_length to {num_tokens} or remove the row"
            )
        return Rollout(
            token_ids_T=np.array(given_ids + learned_ids, dtype=np.int32),
            loss_mask_T=np.arange(num_tokens) >= len(given_ids),
            logprobs_T=np.zeros(num_tokens, dtype=np.float32),
            spans=(),
            finish_reason="stop",
        )


def completion_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages,
    given_ids: list[int],
    completion: str | Messages,
    where: str,
) -> list[int]:
    """Token ids that follow the prompt's `given_ids`, with EOS at their end unless the template has written it."""
    if isinstance(prompt, str) and isinstance(completion, str):
        # Tokenized apart from the prompt, as it is when the policy samples it: no token spans the border.
        learned_ids = text_ids(tokenizer, completion, where, special_tokens=False)
    elif isinstance(prompt, list) and isinstance(completion, list):
        full_ids = conversation_ids(tokenizer, prompt + completion, where, add_generation_prompt=False)
        if full_ids[: len(given_ids)] != given_ids:
            raise ValueError(
                f"{where}: the chat template renders the prompt differently when the completion follows, so the "
                "completion cannot be told from the prompt; use a chat template whose generation prompt begins the "
                "assistant's turn, and a completion that begins with an assistant message without leading blanks"
            )
        learned_ids = full_ids[len(given_ids) :]
    else:
        raise ValueError(
            f"{where}: 'prompt' and 'completion' must both be text or both be messages; correct the row or remove it"
        )
    assert tokenizer.eos_token_id is not None
    # Templates often close a turn with EOS and a line break.
    ended = learned_ids[-1:] if isinstance(completion, str) else learned_ids
    return learned_ids if tokenizer.eos_token_id in ended else [*learned_ids, tokenizer.eos_token_id]
