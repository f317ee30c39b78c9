"""Write the report of a comparison."""

from __future__ import annotations

from pathlib import Path

from danaz.compare.results import ComparisonOutcome
from danaz.files.atomic import write_atomically
from danaz.report.html import report_html
from danaz.report.markdown import report_markdown
from danaz.report.plots import draw
from danaz.report.results_csv import results_csv


def write_report(outcome: ComparisonOutcome) -> list[Path]:
    """Write report.html, report.md, results.csv and the charts into the comparison's folder. Returns their paths."""
    charts = draw(outcome)
    files: dict[str, str | bytes] = {
        "report.html": report_html(outcome, charts),
        "report.md": report_markdown(outcome, charts),
        "results.csv": results_csv(outcome),
    }
    for chart in charts:
        files |= {f"{chart.name}.png": chart.png, f"{chart.name}.svg": chart.svg}
    for name, content in files.items():
        write_atomically(outcome.folder / name, content if isinstance(content, bytes) else content.encode())
    return [outcome.folder / name for name in files]
