"""A report as blocks, and its two forms: Markdown, and one HTML page that loads nothing.

In texts and cells `` `code` ``, ``**bold**`` and links within the page are as in Markdown.
"""

from __future__ import annotations

import html
import re
from typing import Dict, List, NamedTuple, Sequence, Union

from deltasam_fairseq.markdown import markdown_table
from examples.glue.report.plots import Look


class Heading(NamedTuple):
    """A heading of level 1 to 3; those of level 2 and 3 are in the table of contents."""

    level: int
    text: str

    @property
    def name(self) -> str:
        """The name to link to, the one that GitHub gives it in Markdown."""
        kept = "".join(c for c in self.text.lower() if c.isalnum() or c in "-_ ")
        return kept.replace(" ", "-")


class Text(NamedTuple):
    """A paragraph, a note in small print, or a warning."""

    text: str
    kind: str = ""


class Bullets(NamedTuple):
    """A list of points."""

    points: List[str]


class Table(NamedTuple):
    """A table; the rows in ``papers`` are the paper's figures, not ours."""

    caption: str
    head: List[str]
    rows: List[List[str]]
    papers: Sequence[int] = ()


class Figures(NamedTuple):
    """Pictures of a task: SVG elements for the page, the path of one PNG for Markdown."""

    svgs: List[str]
    png: str
    looks: Dict[str, Look]
    text: str


class Details(NamedTuple):
    """Lines of code under a line to open them with."""

    title: str
    code: str


Block = Union[Heading, Text, Bullets, Table, Figures, Details]


# --- Markdown ---------------------------------------------------------------------------------
def to_markdown(blocks: Sequence[Block]) -> str:
    """Return the report as Markdown."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Text):
            parts.append(f"> {block.text}" if block.kind == "warning" else block.text)
        elif isinstance(block, Bullets):
            parts.append("\n".join(f"- {point}" for point in block.points))
        elif isinstance(block, Table):
            parts.append(f"**{block.caption}**\n\n{markdown_table(block.head, block.rows)}")
        elif isinstance(block, Figures):
            parts.append(f"![{block.text}]({block.png})\n\n{block.text}")
        else:
            parts.append(f"{block.title}:\n\n```\n{block.code}\n```")
    return "\n\n".join(parts) + "\n"


# --- HTML -------------------------------------------------------------------------------------
_CSS = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1d2329; --soft: #5d6771;
  --line: #dfe3e6; --grid: #e3e6e8; --band: #f3f5f6; --accent: #1f6fb2; --warn: #fff5e0;
  --warnline: #d9962b; --theirs: #f6f0fb; }
@media (prefers-color-scheme: dark) { :root { --paper: #15191d; --ink: #dfe4e8; --soft: #98a3ad;
  --line: #333b43; --grid: #2c343b; --band: #1d2328; --accent: #6cb2ee; --warn: #33290f;
  --warnline: #b98526; --theirs: #2a2234; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
.page { display: grid; column-gap: 2.5rem; max-width: 87rem; margin: 0 auto;
  grid-template: "nav head" auto "nav main" 1fr / 13.5rem minmax(0, 68rem);
  padding: 2rem 1.5rem 5rem; }
header { grid-area: head; } main { grid-area: main; }
nav { grid-area: nav; position: sticky; top: 1.5rem; align-self: start; overflow-y: auto;
  max-height: calc(100vh - 3rem); font-size: .875rem; line-height: 1.35; }
nav ul { list-style: none; margin: 0; padding: 0; border-left: 2px solid var(--line); }
nav li { margin: 0; } nav li.l3 { padding-left: .9rem; }
nav a { display: block; padding: .22rem .8rem; color: var(--soft); text-decoration: none; }
nav a:hover, nav a:focus { color: var(--accent); }
nav summary { display: none; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; letter-spacing: -.01em; }
h2 { font-size: 1.35rem; margin: 3rem 0 .7rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
h2, h3 { scroll-margin-top: 1rem; line-height: 1.3; }
p, ul { max-width: 46rem; margin: .6rem 0; } ul { padding-left: 1.3rem; } li { margin: .3rem 0; }
.note { color: var(--soft); font-size: .875rem; }
.warning { background: var(--warn); border-left: 4px solid var(--warnline);
  padding: .6rem .9rem; border-radius: 0 4px 4px 0; }
main a, header a { color: var(--accent); }
code { font: .88em/1.4 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  background: var(--band); padding: .08em .3em; border-radius: 3px; overflow-wrap: anywhere; }
pre { background: var(--band); padding: .8rem 1rem; border-radius: 5px; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: .5rem 0; }
pre code { background: none; padding: 0; }
.scroll { overflow-x: auto; margin: 1rem 0 1.2rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; }
th, td { padding: .34rem .75rem; text-align: right; white-space: nowrap; }
table.wide { font-size: .82rem; } .wide th, .wide td { padding: .32rem .5rem; }
th { color: var(--soft); font-weight: 600; border-bottom: 1.5px solid var(--ink); }
td { border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--paper); padding-left: .2rem; }
td:first-child { font-weight: 500; }
small { font-size: .72em; color: var(--soft); }
.words { text-align: left; } .long { white-space: normal; min-width: 16rem; }
tr.theirs td { background: var(--theirs); font-style: italic; }
tr.theirs td:first-child { white-space: normal; min-width: 9rem; max-width: 13rem; }
tbody tr:hover td { background: var(--band); }
.keys { display: flex; flex-wrap: wrap; gap: .25rem 1.2rem; margin: 1.2rem 0 .4rem;
  font-size: .875rem; }
.keys span { display: inline-flex; align-items: center; gap: .4rem; }
.keys i { width: 1.4rem; height: 0; border-top: 3px solid; border-radius: 2px; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18.5rem), 1fr));
  gap: 1rem 1.4rem; }
.figures svg { width: 100%; height: auto; display: block; }
details { margin: .5rem 0; } summary { cursor: pointer; }
@media (max-width: 60rem) { .page { display: block; padding: 1.2rem 1rem 3rem; }
  nav { position: static; max-height: none; margin: 1rem 0 1.5rem; }
  nav ul { columns: 2; column-gap: 1rem; } h2 { margin-top: 2.3rem; }
  nav summary { display: block; font-weight: 600; padding: .2rem 0 .4rem; }
  h1 { font-size: 1.55rem; } }
@media print { :root { --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --grid: #ddd;
  --band: #f4f4f4; --accent: #000; --warn: #fff; --theirs: #f4f0f8; color-scheme: light; }
  body { font-size: 10pt; } .page { display: block; padding: 0; max-width: none; }
  nav { display: none; } .scroll { overflow: visible; break-inside: avoid; }
  table, table.wide { font-size: 8pt; }
  th, td, .wide th, .wide td { padding: .2rem .45rem; } h2, h3, h3 + p { break-after: avoid; }
  tr, .figures > *, .keys { break-inside: avoid; } .keys { break-after: avoid; }
  .figures { grid-template-columns: repeat(3, 1fr); } }
"""


def _inline(text: str) -> str:
    """Return marked text as HTML."""
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\[([^\]]+)\]\((#[\w-]+)\)", r'<a href="\2">\1</a>', text)
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)


def _table(block: Table) -> str:
    def kind(column: Sequence[str]) -> str:
        """Words are set to the left, and wrap where they are long; figures to the right."""
        if not any(re.search("[A-Za-z]{3}", cell) for cell in column):
            return ""
        return ' class="words long"' if max(map(len, column)) > 34 else ' class="words"'

    marks = ["", *(kind(column) for column in list(zip(*block.rows))[1:])]

    def cells(row: Sequence[str], tag: str) -> str:
        texts = [re.sub(r" \((\d+/\d+)\)$", r" <small>\1</small>", _inline(c)) for c in row]
        return "".join(f"<{tag}{m}>{text}</{tag}>" for m, text in zip(marks, texts))

    rows = [
        f"<tr{' class=theirs' if i in block.papers else ''}>{cells(row, 'td')}</tr>"
        for i, row in enumerate(block.rows)
    ]
    wide = ' class="wide"' if len(block.head) > 8 else ""
    return (
        f'<div class="scroll" tabindex="0"><table{wide}>'
        f"<caption>{_inline(block.caption)}</caption>"
        f"<thead><tr>{cells(block.head, 'th')}</tr></thead>\n"
        f"<tbody>{chr(10).join(rows)}</tbody></table></div>"
    )


def _figures(block: Figures) -> str:
    borders = {"-": "solid", ":": "dotted"}
    keys = "".join(
        f'<span><i style="border-color:{look.colour};'
        f'border-top-style:{borders.get(look.line, "dashed")}"></i>{html.escape(name)}</span>'
        for name, look in block.looks.items()
    )
    panels = "\n".join(f"<div>{svg}</div>" for svg in block.svgs)
    return (
        f'<div class="keys">{keys}</div>\n<div class="figures">\n{panels}\n</div>'
        f'<p class="note">{_inline(block.text)}</p>'
    )


def _block(block: Block) -> str:
    if isinstance(block, Heading):
        name = html.escape(block.name)
        return f'<h{block.level} id="{name}">{_inline(block.text)}</h{block.level}>'
    if isinstance(block, Text):
        kind = f' class="{block.kind}"' if block.kind else ""
        return f"<p{kind}>{_inline(block.text)}</p>"
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{_inline(point)}</li>" for point in block.points) + "</ul>"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Figures):
        return _figures(block)
    return (
        f"<details><summary>{_inline(block.title)}</summary>"
        f"<pre><code>{html.escape(block.code)}</code></pre></details>"
    )


def to_html(blocks: Sequence[Block]) -> str:
    """Return the report as one HTML page; it loads nothing from anywhere."""
    headings = [block for block in blocks if isinstance(block, Heading)]
    contents = "".join(
        f'<li class="l{h.level}"><a href="#{html.escape(h.name)}">{_inline(h.text)}</a></li>'
        for h in headings
        if h.level > 1
    )
    title = html.escape(headings[0].text)
    begin = blocks.index(headings[1]) if len(headings) > 1 else len(blocks)
    head, body = (
        "\n".join(_block(block) for block in part) for part in (blocks[:begin], blocks[begin:])
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        f'<div class="page">\n<header>\n{head}\n</header>\n'
        '<nav aria-label="Contents"><details open><summary>Contents</summary>'
        f"<ul>{contents}</ul></details></nav>\n<main>\n{body}\n</main>\n</div>\n</body>\n</html>\n"
    )
