"""The two forms of the report: Markdown, and one HTML page that loads nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Dict, Sequence

import jinja2
import markdown

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=jinja2.StrictUndefined,
)


def to_markdown(context: Dict[str, Any]) -> str:
    """Return the report as Markdown."""
    text = _TEMPLATES.get_template("report.md.jinja").render(context)
    return re.sub(r"\n{3,}", "\n\n", text)


def to_html(text: str, figures: Dict[str, Sequence[str]]) -> str:
    """Return the report as one HTML page.

    Args:
        text: the report as Markdown.
        figures: for each picture in it, SVG elements for the page.
    """
    converter = markdown.Markdown(
        extensions=["tables", "toc"], extension_configs={"toc": {"toc_depth": "2-3"}}
    )
    body = converter.convert(text)
    body = re.sub(
        r'<p><img [^>]*src="([^"]+)"[^>]*></p>',
        lambda picture: f'<div class="figures">{"".join(figures[picture[1]])}</div>',
        body,
    )
    return _TEMPLATES.get_template("page.html.jinja").render(
        title=text.splitlines()[0].lstrip("# "), contents=converter.toc, body=body
    )
