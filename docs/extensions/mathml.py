"""TeX between dollars becomes MathML when the pages are built: a browser draws it without a script or a network."""

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert


def on_page_content(html: str, **_: Any) -> str:
    """Replace what pymdownx.arithmatex has marked, in a line or as a block."""
    for tag, opened, closed, display in (("span", r"\(", r"\)", "inline"), ("div", r"\[", r"\]", "block")):
        pattern = f'<{tag} class="arithmatex">{re.escape(opened)}(.*?){re.escape(closed)}</{tag}>'
        html = re.sub(pattern, lambda found: convert(unescape(found[1]), display=display), html, flags=re.DOTALL)  # noqa: B023
    return html
