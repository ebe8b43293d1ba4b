"""TeX between dollars becomes MathML when the pages are built: a browser draws it without a script or a network."""

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

MARKED = re.compile(r'(class="arithmatex">)\\([(\[])(.*?)\\[)\]](?=</)', re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """Replace what pymdownx.arithmatex has marked, in a line or as a block."""
    return MARKED.sub(lambda m: m[1] + convert(unescape(m[3]), display="block" if m[2] == "[" else "inline"), html)
