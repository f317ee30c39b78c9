"""report.html: a single file with its charts inline, which loads nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from danaz.compare.results import ComparisonOutcome
from danaz.compare.tables import comparison_rows
from danaz.report.markdown import ORIGIN, TEXT_COLUMNS, experiment, heading, remarks
from danaz.report.matrix import matrices
from danaz.report.plots import Chart

STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 68rem; padding: 2.5rem 1.25rem; background: #f6f7f9; color: #1d2329;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.9rem; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 0 0 .8rem; }
p { margin: 0 0 .6rem; max-width: 50rem; }
section { background: #fff; border: 1px solid #e2e5e9; border-radius: 10px; padding: 1.25rem 1.5rem; margin: 1.4rem 0;
  overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th { font-weight: 600; color: #4a545e; border-bottom: 2px solid #d5dae0; vertical-align: bottom; line-height: 1.3; }
th, td { padding: .38rem .7rem; text-align: right; }
td { border-bottom: 1px solid #eceff2; white-space: nowrap; }
th.text, td.text { text-align: left; }
tbody tr:hover { background: #f3f7fb; }
tr.paper td { color: #6a747e; font-style: italic; }
tr.diverged td { background: #fff6e0; }
tr.failed td { background: #fdeaea; }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; }
figcaption, footer { color: #5b656f; font-size: .9rem; margin-top: .6rem; }
.warning { color: #a1260d; }
"""


def report_html(outcome: ComparisonOutcome, charts: Sequence[Chart]) -> str:
    """Return the report as one HTML page."""
    title = escape(heading(outcome))
    sections = [_section(matrix.title, _table(matrix.header, matrix.rows)) for matrix in matrices(outcome)]
    missing = "".join(f'<p class="warning">{escape(line)}</p>' for line in remarks(outcome))
    sections.append(_section("All figures", _table(*comparison_rows(outcome)) + missing))
    sections += [_section(chart.title, _figure(chart)) for chart in charts]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n<p>{escape(experiment(outcome))}</p>\n"
        f"{''.join(sections)}<footer>{escape(ORIGIN)}</footer>\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>\n"


def _figure(chart: Chart) -> str:
    return f"<figure>\n{inline_svg(chart)}\n<figcaption>{escape(chart.caption)}</figcaption>\n</figure>"


def inline_svg(chart: Chart) -> str:
    """Return the <svg> element of a chart, for use inside HTML: without prologue, namespaces and fixed size."""
    element = chart.svg[chart.svg.index("<svg") :].strip()
    element = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", element, count=2)
    size = re.compile(r'\s(?:width|height)="[^"]*pt"')
    head, rest = element.split(">", 1)
    return f'{size.sub("", head)} role="img" aria-label="{escape(chart.title)}">{rest}'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    kinds = [' class="text"' if title in TEXT_COLUMNS else "" for title in header]
    head = "".join(f"<th{kind}>{escape(title)}</th>" for kind, title in zip(kinds, header, strict=True))
    body = "".join(_row(row, kinds) for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"


def _row(row: Sequence[str], kinds: Sequence[str]) -> str:
    cells = "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
    return f"<tr{_row_kind(row)}>{cells}</tr>\n"


def _row_kind(row: Sequence[str]) -> str:
    if "paper" in row[0]:
        return ' class="paper"'
    if "FAILED" in row[-1]:
        return ' class="failed"'
    return ' class="diverged"' if "diverged" in row[-1] else ""
