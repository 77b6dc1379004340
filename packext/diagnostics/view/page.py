"""The page as text: one file, with everything that it needs inside."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any


def plotly_source() -> str:
    """The source of plotly.js, as the Python package of plotly has it.

    Returns:
        JavaScript.

    Raises:
        ImportError: if plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError("The page is drawn by plotly: pip install 'packext[watch]'.") from None
    return get_plotlyjs()


def page(title: str, plotly: str, data: Any) -> str:
    """Put the page together.

    Args:
        title: of the page.
        plotly: an element that brings plotly.js.
        data: what `page.js` is to know from the start.

    Returns:
        HTML.
    """
    part = {
        name: files("packext.diagnostics.view").joinpath(f"page.{name}").read_text("utf-8")
        for name in ("html", "css", "js")
    }
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    title = title.replace("&", "&amp;").replace("<", "&lt;")
    for mark, value in (("css", part["css"]), ("title", title), ("plotly", plotly), ("data", text), ("js", part["js"])):
        part["html"] = part["html"].replace(f"<!-- {mark} -->", value)
    return part["html"]
