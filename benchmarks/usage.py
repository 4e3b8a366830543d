"""`--help` of a benchmark prints its own description, and a word that it does not know starts nothing."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter


def parser_of(module: str, doc: str | None) -> ArgumentParser:
    """For `python -m module`, with the module's docstring."""
    assert doc is not None, "the description of a benchmark is its docstring"
    return ArgumentParser(f"python -m {module}", description=doc, formatter_class=RawDescriptionHelpFormatter)
