"""Which model a run starts from."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from actors.recipe.closed import CLOSED

ChatTemplate = Annotated[
    Annotated[str, Field(min_length=1)] | None,
    Field(
        description="Path of a Jinja file, relative to the working directory, that renders conversations in place of "
        "the tokenizer's own template wherever the run does, and is left with the trained model; null takes the "
        "tokenizer's."
    ),
]


class PretrainedModel(BaseModel):
    """A Hugging Face causal language model: a hub name or a local folder in Hugging Face layout."""

    model_config = CLOSED

    kind: Literal["pretrained"]
    path: str = Field(min_length=1)
    revision: str | None = None
    """Commit, tag or branch on the hub; null takes the default branch."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model; off unless you trust its author."""


class TinyModel(BaseModel):
    """A byte-level Qwen3-type model with random weights, made from this config: for demos and tests without a hub."""

    model_config = CLOSED

    kind: Literal["tiny"]
    hidden_size: int = Field(128, ge=32)
    num_layers: int = Field(4, ge=1)
    num_heads: int = Field(2, ge=1)
    max_position_embeddings: int = Field(256, ge=16)
    tie_word_embeddings: bool = False
    chat_template: ChatTemplate = None


class RecipeModel(BaseModel):
    """The model that another recipe's run leaves behind; that recipe is trained first when it has not run yet."""

    model_config = CLOSED

    kind: Literal["recipe"]
    recipe: str = Field(min_length=1)
    """Path of the other recipe's YAML file, relative to the working directory."""


class FirstPretrained(PretrainedModel):
    """A pretrained model that the run begins with."""

    chat_template: ChatTemplate = None


class FirstOfRecipe(RecipeModel):
    """Another recipe's model that the run begins with."""

    chat_template: ChatTemplate = None


ModelConfig = Annotated[FirstPretrained | TinyModel | FirstOfRecipe, Field(discriminator="kind")]

ReferenceConfig = Annotated[PretrainedModel | RecipeModel, Field(discriminator="kind")]
