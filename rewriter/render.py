"""Views of a report: text for terminals and logs, Markdown, and one HTML page. What they say is in sections.py."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from html import escape

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewriter.report import RewriteReport
from rewriter.sections import Cell, Section, header, sections, summary

WIDTH = 118  # of the text view, wherever it is read


def text(report: RewriteReport) -> str:
    """Plain ASCII but for what the report itself holds; no colours, so that a log reads like a terminal."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(Text(f"rewriter report: {header(report)}"))
    for section in sections(report):
        if section.full_only:
            continue
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2), collapse_padding=True, show_edge=False)
        for column in section.columns:
            table.add_column(Text(column), overflow="fold")
        for row in section.rows:
            table.add_row(*(Text("\n".join(cell)) for cell in row))
        console.print(Text(f"\n{section.title}"), table, sep="\n")
    console.print(Text(f"\n{summary(report)}"))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def markdown(report: RewriteReport) -> str:
    """GitHub's Markdown."""
    parts = ["# rewriter report", _plain(header(report)), f"**{_plain(summary(report))}**"]
    for section in sections(report):
        lines = [_row(section.columns), _row(["---"] * len(section.columns))]
        lines += [_row(_markdown_cell(section, i, cell) for i, cell in enumerate(row)) for row in section.rows]
        parts += [f"## {section.title}", "\n".join(lines)]
    return "\n\n".join(parts)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown_cell(section: Section, column: int, cell: Cell) -> str:
    code = section.columns[column] in section.code
    return "<br>".join(_code(line) if code else _plain(line) for line in cell)


def _code(line: str) -> str:
    """A code span, in a table, of a text with no line ends."""
    return "`" + line.replace("`", "'").replace("|", r"\|") + "`" if line else ""


def _plain(line: str) -> str:
    """Text that is nothing but text: no markup, no HTML."""
    return escape(_MARKUP.sub(r"\\\g<0>", line), quote=False)


_MARKUP = re.compile(r"[\\`*\[\]|~#]|(?<!\w)_|_(?!\w)")  # an underscore inside a word marks nothing


def html(report: RewriteReport) -> str:
    """One page that needs nothing else: no script, no font, no picture."""
    body = []
    for section in sections(report):
        head = "".join(f"<th>{escape(column)}</th>" for column in section.columns)
        rows = "\n".join(
            "<tr>" + "".join(_html_cell(section, i, cell) for i, cell in enumerate(row)) + "</tr>"
            for row in section.rows
        )
        body.append(f"<h2>{escape(section.title)}</h2>\n<table>\n<tr>{head}</tr>\n{rows}\n</table>")
    return _PAGE.format(
        style=_STYLE, environment=escape(header(report)), summary=escape(summary(report)), body="\n".join(body)
    )


def _html_cell(section: Section, column: int, cell: Cell) -> str:
    lines = "<br>".join(escape(line) for line in cell)
    return f"<td><code>{lines}</code></td>" if section.columns[column] in section.code else f"<td>{lines}</td>"


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; }
code { font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
.summary { background: var(--soft); padding: .6rem .8rem; font-weight: 600; }
""".strip()

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>rewriter report</title>
<style>
{style}
</style>
</head>
<body>
<h1>rewriter report</h1>
<p>{environment}</p>
<p class="summary">{summary}</p>
{body}
</body>
</html>"""
