"""Puts an HTML page together: its style, scripts and data inside, so that it needs no other file and no network."""

import json
from pathlib import Path
from typing import Any

_PAGES = Path(__file__).parent / "pages"
_SHARED = ("page.css", "strip.js")
_DATA = '<script type="application/json" id="data">{}</script>'


def page(name: str, data: Any = None) -> str:
    """Return the page `name`.html. data: JSON, which its script finds in the element with the id "data"."""
    text = (_PAGES / f"{name}.html").read_text()
    for shared in _SHARED:
        text = text.replace(f"/* {shared} */", "\n" + (_PAGES / shared).read_text())
    # A model may write anything, and "</script>" within a string would end the element.
    return text.replace(_DATA.format("null"), _DATA.format(json.dumps(data).replace("</", "<\\/")))
