"""Which columns a recipe learns from, and the stream of examples that they become."""

from transformers import PreTrainedTokenizerBase

from actors.data.dataset import Rows
from actors.data.examples import ExampleStream
from actors.data.preferences import JudgementStream, PairStream
from actors.recipe.base import OfflineRecipe
from actors.recipe.preference import KtoRecipe, PreferenceRecipe
from actors.recipe.schema import Recipe, SftRecipe
from actors.run.lessons import Stream


def needed_columns(recipe: Recipe) -> tuple[str, ...]:
    """Columns without which the recipe has nothing to learn from; a supervised stream looks at its own."""
    match recipe:
        case KtoRecipe():
            return "prompt", "completion", "label"
        case PreferenceRecipe():
            return "chosen", "rejected"
        case SftRecipe() if recipe.assistant_only_loss:
            return ()
        case _:
            return ("prompt",)


def example_stream(recipe: OfflineRecipe, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Stream:
    """The tokenized examples, the first rows looked at; ValueError names a bad one."""
    stream: Stream
    shuffle = recipe.dataset.shuffle
    match recipe:
        case KtoRecipe():
            stream = JudgementStream(rows, tokenizer, recipe.seed, shuffle, recipe.max_length)
        case PreferenceRecipe():
            stream = PairStream(rows, tokenizer, recipe.seed, shuffle, recipe.max_length)
        case SftRecipe():
            only = recipe.assistant_only_loss
            stream = ExampleStream(rows, tokenizer, recipe.seed, shuffle, recipe.max_length, only)
        case _:
            raise AssertionError(f"no examples for {type(recipe).__name__}")
    stream.preflight()
    return stream
