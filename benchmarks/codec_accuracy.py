"""What the codecs cost in accuracy: simulated runs of one config, a row for each way to send, beside its bytes.

    python benchmarks/codec_accuracy.py configs/digits.yaml --workers 4 8 --seeds 5
    python benchmarks/codec_accuracy.py configs/cifar10-small.yaml --workers 8 --seeds 1 --set epochs=4 \\
        --set data_dir=… --rows wire=fp32 wire=onebit wire=onebit,wire_warmup_epochs=1

Errors are means over the seeds and, in brackets, their least and largest. Bytes are those of an update's vectors.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from danaz.config import load_config
from danaz.simulate.simulator import simulate

ROWS = [
    "wire=fp32",
    "wire=bf16",
    "wire=fp16",
    "wire=bf16,wire_view=bf16",
    "wire=onebit",
    "wire=onebit,wire_warmup_epochs=2",
    "wire=onebit,wire_view=bf16,wire_warmup_epochs=2",
    "wire=topk:0.1",
    "wire=topk:0.1,wire_warmup_epochs=2",
    "wire=topk:0.01",
    "wire=topk:0.01,wire_warmup_epochs=2",
]


def run(config: str, overrides: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return simulate(load_config(config, overrides), Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="KEY=VALUE,…", help="ways to send")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| algorithm | workers | sent as | push bytes | view bytes | test error % | mean gap |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for workers in options.workers:
        for row in options.rows:
            sets = [*options.overrides, *row.split(","), f"workers={workers}"]
            runs = [run(options.config, [*sets, f"seed={seed}"]) for seed in range(options.seeds)]
            errors = [summary["test_error_percent"] for summary in runs]
            gaps = [summary["mean_gap"] for summary in runs if summary["mean_gap"] is not None]
            print(
                f"| {runs[0]['algorithm']} | {workers} | {row.replace(',', ', ').replace('=', ' ')} "
                f"| {runs[0]['push_bytes_per_update']:,.0f} | {runs[0]['view_bytes_per_update']:,.0f} "
                f"| {statistics.mean(errors):.2f} ({min(errors):.2f} to {max(errors):.2f}) "
                f"| {statistics.mean(gaps) if gaps else float('nan'):.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
