"""What the codecs cost in accuracy: simulated runs of one config, with one row per combination of codecs.

    python benchmarks/codec_accuracy.py configs/digits.yaml --workers 4 8 --seeds 5
    python benchmarks/codec_accuracy.py configs/cifar10-small.yaml --workers 8 --seeds 1 --set epochs=4 \\
        --set data_dir=… --rows wire=fp32 wire=onebit wire=onebit,wire_warmup_epochs=1

An error is the mean over the seeds, with the smallest and the largest in brackets. Bytes are per update.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from accuracy import Row, make_parser, over_seeds, print_table

from danaz.simulate.simulator import simulate

WAYS = [
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


def rows(options: argparse.Namespace) -> Iterator[Row]:
    for workers in options.workers:
        for way in options.rows:
            sets = [*options.overrides, *way.split(","), f"workers={workers}"]
            runs = over_seeds(simulate, options.config, sets, options.seeds)
            sent_bytes = [f"{runs[0][f'{vector}_bytes_per_update']:,.0f}" for vector in ("push", "view")]
            sent_as = way.replace(",", ", ").replace("=", " ")
            yield (runs[0]["algorithm"], str(workers), sent_as, *sent_bytes), runs


def main() -> None:
    parser = make_parser(__doc__, seeds=5)
    parser.add_argument("--rows", nargs="+", default=WAYS, metavar="KEY=VALUE,…", help="config keys of each row")
    torch.set_num_threads(1)
    print_table(("algorithm", "workers", "sent as", "push bytes", "view bytes"), rows(parser.parse_args()))


if __name__ == "__main__":
    main()
