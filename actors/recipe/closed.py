"""What a recipe says is frozen, and a key that it does not know is an error."""

from pydantic import ConfigDict

CLOSED = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
