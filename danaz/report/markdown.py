"""report.md."""

from __future__ import annotations

from collections.abc import Sequence

from danaz.compare.results import Outcome
from danaz.compare.tables import comparison_rows
from danaz.report.matrix import matrices
from danaz.report.plots import Chart

TEXT_COLUMNS = ("algorithm", "run as", "remark", "workers")


def report_markdown(outcome: Outcome, charts: Sequence[Chart]) -> str:
    """The report; its pictures are the PNG files beside it."""
    parts = [f"# {heading(outcome)}", experiment(outcome)]
    for matrix in matrices(outcome):
        parts += [f"## {matrix.title}", _table(matrix.header, matrix.rows)]
    parts += ["## All figures", _table(*comparison_rows(outcome))]
    parts += [f"- {line}" for line in remarks(outcome)]
    for chart in charts:
        parts += [f"## {chart.title}", f"![{chart.title}]({chart.name}.png)", chart.caption]
    parts += [ORIGIN]
    return "\n\n".join(parts) + "\n"


ORIGIN = "Written by `danaz compare`. A row a cell is in results.csv, the runs themselves are in cells/."


def heading(outcome: Outcome) -> str:
    return f"Comparison on {outcome.config['name']}"


def experiment(outcome: Outcome) -> str:
    """What all cells have in common, in a sentence."""
    config = outcome.config
    what = config["workload"] or f"{config['model']} on {config['data']}"
    steps, factor = config["lr_schedule"]["milestones"], config["lr_schedule"]["factor"]
    rate = f"learning rate {config['lr']:g}"
    if steps:
        rate += f" (× {factor:g} at epochs {', '.join(f'{step:g}' for step in steps)})"
    return (
        f"{what}: {config['epochs']} epochs, batches of {config['batch_size']}, {rate}, "
        f"momentum {config['momentum']:g}, weight decay {config['weight_decay']:g}, "
        f"warm-up over {config['lr_schedule']['warmup_epochs']:g} epochs. "
        "Nothing is tuned for the number of workers."
    )


def remarks(outcome: Outcome) -> list[str]:
    """What is missing from the figures."""
    lines = [
        f"{each.algorithm}, {each.setting.label}, seed {each.seed} failed: {each.failure} "
        f"(logs in {(each.folder / 'logs').relative_to(outcome.folder)})"
        for each in outcome.failed
    ]
    if outcome.pending:
        lines.append(f"{len(outcome.pending)} cells were not run yet.")
    return lines


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = [":--" if title in TEXT_COLUMNS else "--:" for title in header]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in (header, rule, *rows))
