"""Training on a stream: an IterableDataset that reads files line by line, and has neither a length nor an index.

    python examples/train_stream.py                                                          # alone
    danaz launch --hosts localhost:4 --workers-per-host 2 --algorithm dana -- python examples/train_stream.py
    danaz launch --hosts localhost:4 --algorithm ssgd -- python examples/train_stream.py     # synchronous

The files are the modules that come with Python. The model learns to tell the text of a comment from a line of code.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, IterableDataset

import danaz.torch as danaz

BUCKETS = 4096  # the model knows a piece of text by its hash
Line = tuple[list[int], float]  # the buckets of its pieces, and 1 for a comment or 0 for code


def buckets_of(text: str) -> list[int]:
    """Return the bucket of each three characters that stand side by side."""
    return [crc32(text[start : start + 3].encode()) % BUCKETS for start in range(len(text) - 2)]


class Lines(IterableDataset[Line]):
    """Each comment of the files, and the line of code before it, mixed by a shuffle buffer."""

    def __init__(self, files: list[Path], mixed: int):
        self.files, self.mixed = files, mixed

    def __iter__(self) -> Iterator[Line]:
        part, parts = danaz.stream_part()  # in place of torch.utils.data.get_worker_info()
        files = self.files[part::parts]
        random.shuffle(files)
        buffer: list[Line] = []
        for line in (line for file in files for line in self.read(file)):
            buffer.append(line)
            if len(buffer) >= self.mixed:
                place = random.randrange(len(buffer))
                buffer[place], buffer[-1] = buffer[-1], buffer[place]
                yield buffer.pop()
        yield from buffer

    @staticmethod
    def read(file: Path) -> Iterator[Line]:
        code = ""
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                text = line.strip()
                if len(text.lstrip("# ")) < 8:
                    continue
                if not text.startswith("#"):
                    code = text
                elif code:
                    yield buckets_of(text.lstrip("# ")), 1.0
                    yield buckets_of(code), 0.0
                    code = ""


def collate(lines: list[Line]) -> tuple[Tensor, Tensor, Tensor]:
    """Return all buckets in a row, where each line begins, and the labels."""
    lengths = torch.tensor([0, *(len(buckets) for buckets, _ in lines)])
    row = torch.tensor([bucket for buckets, _ in lines for bucket in buckets])
    return row, lengths.cumsum(0)[:-1], torch.tensor([label for _, label in lines])


class Classifier(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.embeddings = nn.EmbeddingBag(BUCKETS, width, mode="mean")
        self.perceptron = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, row: Tensor, starts: Tensor) -> Tensor:
        return self.perceptron(self.embeddings(row, starts)).squeeze(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=120, help="updates of the whole cluster")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05)
    options = parser.parse_args()
    danaz.init()
    torch.set_num_threads(1)  # the net is tiny

    files = sorted(Path(argparse.__file__).parent.glob("*.py"))
    loader = DataLoader(Lines(files[10:], mixed=1000), batch_size=options.batch_size, collate_fn=collate)
    torch.manual_seed(0)
    model = Classifier().to(danaz.device())
    optimizer = torch.optim.Adagrad(model.parameters(), lr=options.lr)
    optimizer = danaz.DistributedOptimizer(optimizer, model)

    for number, batch in enumerate(danaz.stream(loader, options.updates)):
        row, starts, labels = (tensor.to(danaz.device()) for tensor in batch)
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(model(row, starts), labels)
        loss.backward()
        optimizer.step(loss=loss)
        if number % 20 == 0 and danaz.is_main():
            print(f"batch {number}: loss {loss.item():.3f}", flush=True)

    if danaz.is_main():
        model.eval()
        row, starts, labels = (tensor.to(danaz.device()) for tensor in collate(list(Lines(files[:10], mixed=1))))
        with torch.no_grad():
            accuracy = ((model(row, starts) > 0) == labels.bool()).double().mean().item()
        danaz.report(test_accuracy_percent=100 * accuracy)
        print(f"test: of {len(labels)} lines of other files, {accuracy:.2%} are told right", flush=True)


if __name__ == "__main__":
    main()
