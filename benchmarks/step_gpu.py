"""What a training step costs with danaz on a GPU: a plain loop, the same with danaz, and with danaz --pipeline.

    python benchmarks/step_gpu.py                                       # ResNet-50, bf16, batches of 256
    python benchmarks/step_gpu.py --device cpu --model small --batch 8  # try the script without a GPU

One worker trains on one GPU with a server on the same machine, over loopback, as `danaz launch --hosts localhost:1`
starts them. The batch is on the device from the beginning, so that no reading of data is measured. Each way runs in
its own processes, and all ways take turns. The result is the median over the turns; a turn gives the mean time of its
steps, and waits for the device before it reads the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import danaz.torch as danaz
from danaz.workloads.cifar10_resnet import ResNet

WAYS: dict[str, list[str] | None] = {
    "alone": None,
    "danaz": [],
    "danaz --pipeline": ["--pipeline"],
}  # options of `danaz launch`; None: without danaz
AFTER = 2  # steps after the measured ones, because nothing hides the last push of a run


class Bottleneck(nn.Module):
    """Three convolutions around a shortcut (He et al., CVPR 2016); the middle one has the stride."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            *convolution(inputs, width, 1), nn.ReLU(inplace=True),
            *convolution(width, width, 3, stride), nn.ReLU(inplace=True),
            *convolution(width, outputs, 1),
        )  # fmt: skip
        self.shortcut = nn.Sequential(*(convolution(inputs, outputs, 1, stride) if inputs != outputs else ()))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)


def resnet50() -> nn.Module:
    """Return a ResNet-50 for 1000 classes: 25.6 M parameters."""
    layers = [*convolution(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, width, 2 if block == 0 and width > 64 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


MODELS = {
    "resnet50": (resnet50, 224),
    "small": (lambda: ResNet(blocks_per_stage=1), 32),
}  # with the width and height of images in pixels


def batches(way: str, loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the batches of one epoch, as this way shares them out."""
    if WAYS[way] is None:
        yield from loader
        return
    for epoch in danaz.epochs(1):
        yield from danaz.shard(loader, epoch)


def measure(options: argparse.Namespace) -> None:
    """Train in one of the ways, and write the milliseconds per step into the file ``figures``."""
    alone = WAYS[options.way] is None
    if not alone:
        danaz.init()
    device = torch.device(options.device)
    build, pixels = MODELS[options.model]
    model = build().to(device, memory_format=torch.channels_last).train()
    x = torch.randn(options.batch, 3, pixels, pixels, device=device).to(memory_format=torch.channels_last)
    y = torch.randint(10, (options.batch,), device=device)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
    if not alone:
        optimizer = danaz.DistributedOptimizer(optimizer, model)
    numbers: Any = range(options.warm_up + options.steps + AFTER)  # the batch is always the same
    clock = []
    for step, _ in enumerate(batches(options.way, DataLoader(numbers, batch_size=1))):
        if step in (options.warm_up, options.warm_up + options.steps):
            if device.type == "cuda":
                torch.cuda.synchronize()
            clock.append(time.perf_counter())
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step() if alone else optimizer.step(loss=loss)
    began, ended = clock
    options.figures.write_text(json.dumps(1000 * (ended - began) / options.steps))


def run(way: str, options: argparse.Namespace) -> float:
    """Return the milliseconds per step of one way, measured in new processes."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder, "figures.json")
        script = [sys.executable, __file__, "--way", way, "--figures", str(figures), *sys.argv[1:]]
        launch = [sys.executable, "-m", "danaz", "launch", "--hosts", "localhost:1", "--algorithm", "dana"]
        extra = WAYS[way]
        command = script if extra is None else [*launch, *extra, "--out", f"{folder}/run", "--", *script]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise SystemExit(f"{way}: exit code {done.returncode}\n{done.stdout}")
        return float(json.loads(figures.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", choices=MODELS, default="resnet50")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100, help="measured steps in each turn")
    parser.add_argument("--warm-up", type=int, default=20, help="steps before the measured ones")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--figures", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "torch sees no GPU here, so there is nothing to measure. To try the script itself: "
            "--device cpu --model small --batch 8 --steps 5 --warm-up 1"
        )
    if options.way:
        measure(options)
        return
    name = torch.cuda.get_device_name() if options.device == "cuda" else "the CPU"
    print(
        f"{options.model}, bf16, batches of {options.batch}, on {name}; {options.turns} turns of {options.steps} steps"
    )
    turns = [{way: run(way, options) for way in WAYS} for _ in range(options.turns)]
    alone = statistics.median(turn["alone"] for turn in turns)
    for way in WAYS:
        times = sorted(turn[way] for turn in turns)
        middle = statistics.median(times)
        spread = f"{times[0]:.2f} to {times[-1]:.2f}"
        print(f"{way:18} {middle:9.2f} ms a step ({spread})   {middle - alone:+8.2f} ms   x {middle / alone:.3f}")


if __name__ == "__main__":
    main()
