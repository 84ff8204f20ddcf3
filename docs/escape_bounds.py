"""An extension of the API page's generator: a bound such as "> 0" at the start of a description is no block quote."""

import re
from typing import Any

import griffe

# a description starts a line, or follows "name: "; ">>>" is an example
_BOUND = re.compile(r"^(\s*(?:\*{0,2}\w+(?: \([^)]*\))?: )?)(?=>(?!>>))", flags=re.MULTILINE)


def escaped(docstring: str) -> str:
    """The docstring with a backslash before each ">" that Markdown would read as a block quote."""
    return _BOUND.sub(r"\1\\", docstring)


class EscapeBounds(griffe.Extension):
    """Escapes the docstrings of everything that is documented."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each object that it has loaded."""
        if obj.docstring is not None:
            obj.docstring.value = escaped(obj.docstring.value)
