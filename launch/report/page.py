"""The HTML page of a report: one file that needs nothing else, not even a network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: #222; background: #fff;
  max-width: 1100px; margin: 2em auto; padding: 0 1.2em; }
h1 { font-size: 1.5em; margin-bottom: .2em; }
h2 { font-size: 1.15em; margin-top: 2.2em; border-bottom: 1px solid #ddd; padding-bottom: .2em; }
p.lead { color: #555; margin-top: 0; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
div.wide { overflow-x: auto; }
th, td { padding: .25em .8em; border-bottom: 1px solid #e6e6e6; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; white-space: pre; }
td.text, th.text { text-align: left; white-space: normal; }
thead th { border-bottom: 2px solid #bbb; }
img { max-width: 100%; display: block; margin: .6em 0; }
ul.notes { list-style: none; padding: 0; }
ul.notes li { padding: .45em .8em; margin: .35em 0; background: #fff6e0; border-left: 4px solid #e69f00; }
ul.notes li.forbids { background: #fdeaea; border-left-color: #c8443c; }
p.caption { color: #555; font-size: 13.5px; max-width: 75ch; }
code { background: #f3f3f3; padding: 0 .25em; }
footer { color: #777; font-size: 13px; margin-top: 3em; }
"""


@dataclass(frozen=True)
class Note:
    """A sentence that a reader must not miss; forbids: in red."""

    text: str
    forbids: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of text, the first cell of each naming it. text_from: column from which cells are words, not numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_from: int | None = None


@dataclass(frozen=True)
class Picture:
    """A PNG, and what it says in words."""

    png: bytes
    alternative: str


@dataclass(frozen=True)
class Link:
    """To a file beside the page."""

    file: str
    text: str


@dataclass(frozen=True)
class Section:
    """A part of the page; caption: what its pictures and tables mean."""

    title: str
    parts: Sequence[Table | Picture | Link]
    caption: str = ""


def page(title: str, lead: str, notes: Sequence[Note], sections: Sequence[Section], footer: str) -> str:
    """The whole file."""
    listed = "".join(
        f'<li class="{"forbids" if note.forbids else "differs"}">{escape(note.text)}</li>\n' for note in notes
    )
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(lead)}</p>',
        f'<ul class="notes">\n{listed}</ul>' if notes else "",
        *(_section(section) for section in sections),
        f"<footer>{escape(footer)}</footer>",
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>\n'
        "<body>\n" + "\n".join(part for part in body if part) + "\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    caption = f'<p class="caption">{escape(section.caption)}</p>' if section.caption else ""
    return "\n".join([f"<h2>{escape(section.title)}</h2>", *(_part(part) for part in section.parts), caption])


def _part(part: Table | Picture | Link) -> str:
    if isinstance(part, Picture):
        data = base64.b64encode(part.png).decode()
        return f'<img alt="{escape(part.alternative)}" src="data:image/png;base64,{data}">'
    if isinstance(part, Link):
        return f'<p><a href="{escape(part.file)}">{escape(part.text)}</a></p>'
    start = len(part.head) if part.text_from is None else part.text_from
    head = "".join(_cell("th", name, i >= start) for i, name in enumerate(part.head))
    rows = "".join(
        "<tr>" + "".join(_cell("td", cell, i >= start) for i, cell in enumerate(row)) + "</tr>\n" for row in part.rows
    )
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>'


def _cell(tag: str, text: str, is_text: bool) -> str:
    kind = ' class="text"' if is_text else ""
    return f"<{tag}{kind}>{escape(text)}</{tag}>"
