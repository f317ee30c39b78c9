"""report.md, and the sentences that report.html shares with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from danaz.compare.results import ComparisonOutcome
from danaz.compare.tables import comparison_rows
from danaz.report.matrix import matrices
from danaz.report.plots import Chart

TEXT_COLUMNS = ("algorithm", "run as", "remark", "workers")


def report_markdown(outcome: ComparisonOutcome, charts: Sequence[Chart]) -> str:
    """Return the report as Markdown; its pictures are the PNG files in the same folder."""
    parts = [f"# {heading(outcome)}", experiment(outcome)]
    for matrix in matrices(outcome):
        parts += [f"## {matrix.title}", _table(matrix.header, matrix.rows)]
    parts += ["## All figures", _table(*comparison_rows(outcome))]
    parts += [f"- {line}" for line in remarks(outcome)]
    for chart in charts:
        parts += [f"## {chart.title}", f"![{chart.title}]({chart.name}.png)", chart.caption]
    parts += [ORIGIN]
    return "\n\n".join(parts) + "\n"


ORIGIN = "Written by `danaz compare`. results.csv has one row per cell; the runs themselves are in cells/."


def heading(outcome: ComparisonOutcome) -> str:
    return f"Comparison on {outcome.config['name']}"


def experiment(outcome: ComparisonOutcome) -> str:
    """Return what all cells have in common, as a sentence."""
    config = outcome.config
    what = config["workload"] or f"{config['model']} on {config['data']}"
    steps, factor = config["lr_schedule"]["milestones"], config["lr_schedule"]["factor"]
    rate = f"learning rate {config['lr']:g}"
    if steps:
        rate += f" (× {factor:g} at epochs {', '.join(f'{step:g}' for step in steps)})"
    return (
        f"{what}: {config['epochs']} epochs, batches of {config['batch_size']}, {_optimizer(config)}, {rate}, "
        f"weight decay {config['weight_decay']:g}, "
        f"warm-up over {config['lr_schedule']['warmup_epochs']:g} epochs. "
        "Nothing is tuned for the number of workers."
    )


def _optimizer(config: Mapping[str, Any]) -> str:
    """Return the optimizer with its options, in words; a comparison of an earlier version knows SGD only."""
    if config.get("optimizer", "sgd") == "sgd":
        return f"sgd with momentum {config['momentum']:g}"
    options = ", ".join(f"{name} {value}" for name, value in config["optimizer_options"].items())
    return f"{config['optimizer']} with {options}" if options else str(config["optimizer"])


def remarks(outcome: ComparisonOutcome) -> list[str]:
    """Return sentences about the cells that have no figures: those that failed or have not run."""
    lines = [
        f"{each.algorithm}, {each.setting.label}, seed {each.seed} failed: {each.failure} "
        f"(logs in {(each.folder / 'logs').relative_to(outcome.folder)})"
        for each in outcome.failed
    ]
    if outcome.pending:
        lines.append(f"Cells that have not run yet: {len(outcome.pending)}.")
    return lines


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = [":--" if title in TEXT_COLUMNS else "--:" for title in header]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in (header, rule, *rows))
