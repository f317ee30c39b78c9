"""A small GPT that learns characters, with the usual parts: AdamW, warm-up and cosine, clipping, bf16.

    python examples/train_gpt.py                                                          # alone
    danaz launch --hosts localhost:4 --workers-per-host 2 --algorithm dana -- python examples/train_gpt.py
    danaz launch --hosts localhost:4 --algorithm ssgd -- python examples/train_gpt.py     # synchronous

It reads the help texts that come with Python, and draws its batches itself: there is no DataLoader.
"""

from __future__ import annotations

import argparse
import math
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import danaz.torch as danaz

CONTEXT = 64  # characters that a prediction may look at
BATCH = 16  # sequences that each rank draws for a step


class Block(nn.Module):
    """Attention to the characters before, then a perceptron."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.query_key_value(self.norm_1(x)).split(width, dim=2)
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.perceptron(self.norm_2(x))


class Gpt(nn.Module):
    """Predicts the next character at each place of a sequence."""

    def __init__(self, characters: int, width: int = 64, heads: int = 4, layers: int = 2):
        super().__init__()
        self.characters, self.places = nn.Embedding(characters, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters, bias=False)
        self.head.weight = self.characters.weight  # tied
        for embedding in (self.characters, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        x = self.characters(text) + self.places.weight[: text.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def draw(text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return some sequences, and the same ones a character later: i64[BATCH, CONTEXT] each."""
    starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=generator).tolist()
    sequences = torch.stack([text[start : start + CONTEXT + 1] for start in starts])
    return sequences[:, :-1], sequences[:, 1:]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        logits = model(x)
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="updates of the whole cluster")
    parser.add_argument("--lr", type=float, default=3e-3)
    options = parser.parse_args()
    danaz.init()
    torch.set_num_threads(1)

    corpus = "\n".join(topics[name] for name in sorted(topics))
    alphabet = sorted(set(corpus))
    number_of = {character: number for number, character in enumerate(alphabet)}
    text = torch.tensor([number_of[character] for character in corpus])
    train, test = text[: -len(text) // 10], text[-len(text) // 10 :]

    torch.manual_seed(0)
    model = Gpt(len(alphabet)).to(danaz.device())
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95))
    optimizer = danaz.DistributedOptimizer(optimizer, model)
    warm_up = options.steps // 10
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / (warm_up + 1), 0.55 + 0.45 * math.cos(math.pi * step / options.steps)),
    )

    for step in danaz.steps(options.steps, samples=BATCH):
        generator = torch.Generator().manual_seed(danaz.seed_for(step))
        x, y = (part.to(danaz.device()) for part in draw(train, generator))
        loss = loss_of(model, x, y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(loss=loss)
        scheduler.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f} (worker {danaz.worker_id()}, rank {danaz.rank()})", flush=True)

    if danaz.is_main():
        model.eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            losses = [
                loss_of(model, *(part.to(danaz.device()) for part in draw(test, generator))).item() for _ in range(20)
            ]
        bits = sum(losses) / len(losses) / math.log(2)
        danaz.report(test_bits_per_character=bits)
        print(f"test: {bits:.3f} bits per character", flush=True)


if __name__ == "__main__":
    main()
