"""A chat template that the recipe names is the tokenizer's own from its loading on, and is saved with it."""

from collections.abc import Collection
from pathlib import Path

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

KEY = "model.chat_template"
_FILE = "chat_template.jinja"
"""What transformers calls it in a folder that holds a tokenizer."""
_FIX = "correct the file, or leave the key out to take the model's own template"
_SAID = "Hello"


def with_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer with the template in the file as its own; ValueError names the file that is none.

    Without a path it is as it was. Who saves the tokenizer saves the template with it.
    """
    if path is None:
        return tokenizer
    text = _read(path)
    tokenizer.chat_template = text
    try:
        shown = tokenizer.apply_chat_template(
            [{"role": "user", "content": _SAID}], tokenize=False, add_generation_prompt=True
        )
    except TemplateSyntaxError as error:
        raise ValueError(
            f"{KEY}: '{path}' is no Jinja template (line {error.lineno}: {error.message}); {_FIX}"
        ) from error
    except TemplateError:
        return tokenizer  # it refuses this conversation, and may well take those of the data
    except (TypeError, ValueError, LookupError) as error:
        raise ValueError(f"{KEY}: '{path}' cannot render a user's message ({error}); {_FIX}") from error
    if _SAID not in str(shown):
        raise ValueError(f"{KEY}: '{path}' does not show what the user says, so it is no chat template; {_FIX}")
    return tokenizer


def check_unchanged(
    tokenizer: PreTrainedTokenizerBase, path: str | None, model: Path, allowed: Collection[str]
) -> None:
    """ValueError when the file holds another template than that which a checkpoint's model was trained with."""
    kept = model / _FILE
    if path is None or KEY in allowed or not kept.exists():
        return
    if kept.read_text(encoding="utf-8") != tokenizer.chat_template:
        raise ValueError(
            f"{KEY}: '{path}' has changed since the run began; go on with --allow-change {KEY}, restore it from "
            f"{kept}, or begin anew with --overwrite"
        )


def _read(path: str) -> str:
    file = Path(path).expanduser()
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{KEY}: there is no file '{path}' (working directory: {Path.cwd()}); correct {KEY}") from None
    except OSError as error:
        raise ValueError(f"{KEY}: '{path}' cannot be read: {error.strerror}; correct {KEY}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{KEY}: '{path}' is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
