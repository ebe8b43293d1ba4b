"""Docstrings are written for ``help()`` and editors; MkDocs gets Sphinx's roles and ``::`` as Markdown."""

import re
from typing import Any

import griffe


class Roles(griffe.Extension):
    """``:func:`name``` becomes ```name```; ``::`` before an example goes."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of one object."""
        if obj.docstring:
            text = re.sub(r":(?:func|class|meth|mod|data):`~?([^`]+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"^\s*::\n", "", text, flags=re.MULTILINE)
