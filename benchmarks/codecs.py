"""What each codec of pushes saves and costs: bytes per float, speed in MB/s of float32, and error.

    python benchmarks/codecs.py

The data are one chunk as it is sent over the wire, with normally distributed values, on one thread. Repetitions of the
codecs alternate, and the figures are medians. `push` is all that a worker does: error feedback, encoding and decoding.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch

from danaz.vectors.codecs import Compressor, push_codec
from danaz.vectors.cutting import SLICE_FLOATS


def seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codecs", nargs="*", default=["bf16", "fp16", "onebit", "topk:0.01", "topk:0.1"])
    parser.add_argument("--floats", type=int, default=SLICE_FLOATS)
    parser.add_argument("--repetitions", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chunk, out = torch.randn(options.floats), torch.empty(options.floats)
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    codecs = [push_codec(name) for name in options.codecs]
    compressors = [Compressor(codec, [(0, options.floats)]) for codec in codecs]
    for _ in range(options.repetitions):
        for codec, compressor in zip(codecs, compressors, strict=True):
            data, push = codec.encode(chunk), chunk.clone()
            times[codec.name, "encode"].append(seconds(lambda codec=codec: codec.encode(chunk)))  # type: ignore[misc]
            times[codec.name, "decode"].append(seconds(lambda codec=codec, data=data: codec.decode(data, out)))  # type: ignore[misc]
            times[codec.name, "push"].append(seconds(lambda c=compressor, push=push: c.compress(push, 0.0)))  # type: ignore[misc]
    print("| codec | bytes per float | compression | encode MB/s | decode MB/s | push MB/s | relative error (norm) |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for codec in codecs:
        data = codec.encode(chunk)
        codec.decode(data, out)
        speeds = [
            4e-6 * options.floats / statistics.median(times[codec.name, what]) for what in ("encode", "decode", "push")
        ]
        lost = float((chunk - out).norm() / chunk.norm())
        print(
            f"| {codec.name} | {len(data) / options.floats:.3f} | {4 * options.floats / len(data):.1f} | "
            + " | ".join(f"{speed:,.0f}" for speed in speeds)
            + f" | {lost:.4f} |"
        )


if __name__ == "__main__":
    main()
