"""Docstrings are written for ``help()`` and editors; MkDocs gets Sphinx's roles and ``::`` as Markdown, types bare."""

import ast
import re
from textwrap import dedent
from typing import Any

import griffe


class Roles(griffe.Extension):
    """``:func:`name``` becomes ```name```; the indented block after ``::`` becomes a fenced one."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of one object, and the types of its arguments."""
        for parameter in obj.parameters if isinstance(obj, griffe.Function) else ():
            parameter.annotation = bare(parameter.annotation)
        if obj.docstring:
            text = re.sub(r":(?:attr|func|class|meth|mod|data):`~?([^`]+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"(\S?) ?::\n\n((?: {4}.*\n*|\n)+)", fence, text)


def bare(annotation: str | griffe.Expr | None) -> str | griffe.Expr | None:
    """``Annotated[int, …]`` is ``int``; the rest of it is for the check of options."""
    if isinstance(annotation, griffe.ExprSubscript) and str(annotation.left) == "Annotated":
        return annotation.slice.elements[0]
    return annotation


def fence(found: re.Match[str]) -> str:
    """The block as code: Python if it can be read as that, else a formula. After text a colon stays."""
    before, code = found[1], dedent(found[2]).strip()
    try:
        ast.parse(code)
        language = "python"
    except SyntaxError:
        language = "text"
    return f"{before}{':' if before and before != '.' else ''}\n\n```{language}\n{code}\n```\n\n"
