"""What the verbs share: their arguments, and that an error which is the user's to mend is one message without a
traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe's YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides such as staleness.max_staleness=0.")
]


@contextmanager
def user_errors(kind: type[ValueError] = ValueError) -> Iterator[None]:
    """A ValueError of this kind is for the user to mend and is printed; all else keeps its traceback."""
    try:
        yield
    except kind as error:
        first, *others = str(error).splitlines() or [repr(error)]
        typer.echo("\n".join([f"error: {first}", *(f"       {line}" for line in others)]), err=True)
        raise typer.Exit(2) from None


@contextmanager
def run_errors() -> Iterator[None]:
    """A RunError is one sentence."""
    from actors.errors import RunError

    try:
        yield
    except RunError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
