"""The template that a recipe names is what prompts, examples and the model that is left are rendered with."""

from pathlib import Path

import pytest

from actors.data.chat import assistant_tokens
from actors.data.prompts import prompt_ids
from actors.model.load import load_tokenizer
from actors.model.template import check_unchanged, with_template
from actors.model.tiny import byte_tokenizer, make_tiny_model
from actors.recipe.file import RecipeError, dump_recipe, load_recipe
from actors.recipe.model import TinyModel
from actors.rewards.classifier import load_tokenizer_of
from deploy.train import prepare, words
from tests.actors.data.families import MARKED, MISTRAL
from tests.actors.data.test_real_templates import shipped
from tests.deploy.doctor.recipes import TINY, recipe_of

ASKED = [{"role": "user", "content": "hi"}]
TALK = [*ASKED, {"role": "assistant", "content": "ho"}]
OWN = "{% for m in messages %}({{ m['role'] }}){{ m['content'] }}<|im_end|>{% endfor %}" + (
    "{% if add_generation_prompt %}(assistant){% endif %}"
)


def written(folder: Path, text: str = OWN) -> str:
    path = folder / "own.jinja"
    path.write_text(text)
    return str(path)


def test_without_a_key_the_tokenizer_keeps_its_own() -> None:
    tokenizer = byte_tokenizer(256)
    before = tokenizer.chat_template
    assert with_template(tokenizer, None).chat_template == before


def test_prompts_and_examples_are_rendered_with_it(tmp_path: Path) -> None:
    tokenizer = with_template(byte_tokenizer(256), written(tmp_path))
    assert tokenizer.decode(prompt_ids(tokenizer, ASKED, "row 0")) == "(user)hi<|im_end|>(assistant)"
    token_ids, said = assistant_tokens(tokenizer, TALK, "row 0")
    assert tokenizer.decode(token_ids) == "(user)hi<|im_end|>(assistant)ho<|im_end|>"
    assert tokenizer.decode([t for t, is_said in zip(token_ids, said, strict=True) if is_said]) == "ho<|im_end|>"


@pytest.mark.parametrize("text", [OWN, MARKED, MISTRAL, shipped("qwen3_training"), shipped("gemma")])
def test_it_is_left_with_the_model(tmp_path: Path, text: str) -> None:
    """Others load it with the tokenizer: rollouts of the next run, and a reward model's own child process."""
    with_template(byte_tokenizer(256), written(tmp_path, text)).save_pretrained(tmp_path / "model")
    for load in (lambda path: load_tokenizer(path, None, False), load_tokenizer_of):
        assert load(str(tmp_path / "model")).chat_template == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for m in messages %}{{ m['content'] }}", "is no Jinja template .line 1: "),
        ("\n{{ messages[0]['content' }}", "is no Jinja template .line 2: "),
        ("the model's card", "does not show what the user says, so it is no chat template; correct the file, or leave"),
        ("", "does not show what the user says"),
        ("{{ messages[0]['content'] + 1 }}", "cannot render a user's message"),
    ],
    ids=["no end", "a slip", "no template", "empty", "a sum"],
)
def test_what_is_no_template_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=f"^model.chat_template: '{path}' {message}"):
        with_template(byte_tokenizer(256), path)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.chat_template: there is no file 'none.jinja' \(working directory: "):
        with_template(byte_tokenizer(256), "none.jinja")
    with pytest.raises(ValueError, match=rf"model.chat_template: '{tmp_path}' cannot be read: Is a directory; correct"):
        with_template(byte_tokenizer(256), str(tmp_path))
    (tmp_path / "latin.jinja").write_bytes("{# für #}".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.jinja' is not UTF-8 text \(byte 4\); save it"):
        with_template(byte_tokenizer(256), str(tmp_path / "latin.jinja"))


def test_a_template_that_wants_another_conversation_is_taken(tmp_path: Path) -> None:
    wants = "{% if messages|length < 2 %}{{ raise_exception('ask for more') }}{% endif %}" + OWN
    assert with_template(byte_tokenizer(256), written(tmp_path, wants)).chat_template == wants


@pytest.mark.parametrize("kind", ["tiny", "pretrained", "recipe"])
def test_every_model_that_a_run_begins_with_may_have_one(tmp_path: Path, kind: str) -> None:
    own = written(tmp_path)
    match kind:
        case "tiny":
            overrides = [f"model.chat_template={own}"]
        case "pretrained":
            size = TinyModel(kind="tiny", hidden_size=64, num_layers=1, num_heads=1)
            make_tiny_model(size, tmp_path / "model", 0)
            overrides = [f"model={{kind: pretrained, path: {tmp_path}/model, chat_template: {own}}}"]
        case _:
            first = recipe_of(tmp_path, f"run_dir={tmp_path}/first")
            dump_recipe(first, tmp_path / "first.yaml")
            overrides = [f"model={{kind: recipe, recipe: {tmp_path}/first.yaml, chat_template: {own}}}"]
    recipe = recipe_of(tmp_path, *overrides, rows=[{"prompt": ASKED, "answer": "ho"}])
    assert words(recipe)[0].chat_template == OWN


def test_a_model_that_another_recipe_has_yet_to_leave_brings_its_own(tmp_path: Path) -> None:
    dump_recipe(
        recipe_of(tmp_path, f"run_dir={tmp_path}/first", f"model.chat_template={written(tmp_path)}"),
        tmp_path / "first.yaml",
    )
    recipe = recipe_of(tmp_path, f"model={{kind: recipe, recipe: {tmp_path}/first.yaml}}")
    assert words(recipe)[0].chat_template == OWN


@pytest.mark.parametrize("key", ["reference", "critic.model"])
def test_where_nothing_is_rendered_the_key_is_unknown(key: str) -> None:
    with pytest.raises(RecipeError, match=rf"{key}.*chat_template.*unknown key"):
        load_recipe("recipes/demo.yaml", [f"{key}={{kind: pretrained, path: a/b, chat_template: own.jinja}}"])


def test_a_file_that_has_changed_is_not_gone_on_with(tmp_path: Path) -> None:
    path, model = written(tmp_path), tmp_path / "model"
    with_template(byte_tokenizer(256), path).save_pretrained(model)
    check_unchanged(with_template(byte_tokenizer(256), path), path, model, ())
    written(tmp_path, "changed" + OWN)
    now = with_template(byte_tokenizer(256), path)
    with pytest.raises(ValueError, match=r"chat_template: .* has changed since the run began; go on with --allow"):
        check_unchanged(now, path, model, ("model.path",))
    check_unchanged(now, path, model, ("model.chat_template",))
    check_unchanged(byte_tokenizer(256), None, model, ())


def test_train_refuses_a_file_that_is_not_there(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, f"model={TINY}", f"model.chat_template={tmp_path}/none.jinja")
    with pytest.raises(ValueError, match=r"model.chat_template: there is no file '.*/none.jinja'"):
        prepare(recipe, "recipes/demo.yaml", None, False)
