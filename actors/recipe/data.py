"""Where a run takes its rows from."""

from typing import Any

from pydantic import BaseModel, Field

from actors.recipe.closed import CLOSED


class DatasetConfig(BaseModel):
    """Where prompts come from: a hub name, a local file, or a generated task of reasoning-gym."""

    model_config = CLOSED

    path: str = Field(min_length=1)
    """Hub name, `*.jsonl`, `*.json`, `*.parquet`, `*.csv`, a folder saved by `datasets`, or `reasoning_gym:<task>`."""
    name: str | None = None
    """Configuration of the hub data set."""
    split: str = "train"
    """Split of the data set, or a part of it, such as `train[:1000]`."""
    revision: str | None = None
    """Commit, tag or branch on the hub; null takes the default branch."""
    task: dict[str, Any] = {}
    """Settings of the reasoning-gym task, such as `{min_word_len: 3}`."""
    size: int | None = Field(None, ge=1)
    """Use this many rows; required for reasoning-gym tasks, which are endless."""
    seed: int = 0
    """Seed of the generated task (which words, which numbers), not of the order of the rows."""
    prompt_suffix: str = ""
    """Appended to every standard (string) prompt, such as `\\nAnswer: `."""
    shuffle: bool = True
    """Each epoch has an order of its own; false takes the rows as they come."""
    max_bad_rows: int = Field(0, ge=0)
    """Rows that cannot be prompts are set aside and told; more of them than this stop the run."""
