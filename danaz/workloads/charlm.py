"""A small GPT (Radford et al. 2018) that predicts the next character of English text. Nothing is downloaded.

The text is Python's own documentation, which every Python brings along for ``help()``: some 450,000 characters. It
differs a little from one version of Python to the next, so each run reports which text it has read.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from danaz.run.config import Config
from danaz.workloads.base import Workload, workload

# The same for each text, so that the model has the same parameters under each version of Python.
ALPHABET = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1))) + "�"  # the last one stands for all others
CONTEXT = 64  # number of characters that a prediction may look at
WIDTH, HEADS, LAYERS = 64, 4, 2


# ---- data ------------------------------------------------------------------------------------------------------------


def read_text() -> str:
    """Return the text of all help topics, in the order of their names."""
    from pydoc_data.topics import topics  # it is large, and no other workload needs it

    return "\n".join(topics[name] for name in sorted(topics))


def encode(text: str) -> Tensor:
    """Return the place of each character in the alphabet, u8[n]."""
    place = {character: number for number, character in enumerate(ALPHABET)}
    return torch.tensor([place.get(character, len(ALPHABET) - 1) for character in text], dtype=torch.uint8)


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Pieces of a text, one after the other: CONTEXT characters, and the character that follows each of them."""

    def __init__(self, text: Tensor) -> None:
        self.pieces = text.unfold(0, CONTEXT + 1, CONTEXT)  # u8[n, CONTEXT + 1], no copy

    def to(self, device: torch.device) -> Windows:
        """Return the same pieces on ``device``."""
        moved = copy(self)
        moved.pieces = self.pieces.to(device)
        return moved

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return characters and their successors, i64[B, CONTEXT] each."""
        pieces = self.pieces[torch.as_tensor(indices, device=self.pieces.device)].long()
        return pieces[:, :-1], pieces[:, 1:]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return characters and their successors, i64[CONTEXT] each."""
        characters, successors = self.__getitems__([index])
        return characters[0], successors[0]


# ---- model -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention to the characters so far, then a perceptron; each adds to what it reads (pre-norm)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)  # queries, keys and values
        self.mix = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # f32[B, T, width] -> f32[B, T, width]
        heads = self.attention(self.norm1(x)).unflatten(2, (3, self.heads, -1))  # f32[B, T, 3, heads, width / heads]
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # f32[B, heads, T, width / heads]
        x = x + self.mix(seen.transpose(1, 2).flatten(2))
        out: Tensor = x + self.perceptron(self.norm2(x))
        return out


class Gpt(nn.Module):
    """Returns a score of each character for being next, at each place of a text. The classes are dimension 1."""

    def __init__(
        self, characters: int = len(ALPHABET), width: int = WIDTH, heads: int = HEADS, layers: int = LAYERS
    ) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)  # it also gives the scores, so both share their weights
        self.places = nn.Parameter(torch.empty(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for matrix in (parameter for parameter in self.parameters() if parameter.dim() > 1):
            nn.init.normal_(matrix, std=0.02)

    def forward(self, text: Tensor) -> Tensor:  # i64[B, T] -> f32[B, characters, T]
        x = self.characters(text) + self.places[: text.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.characters.weight).transpose(1, 2)


@workload("charlm")
def build_charlm(config: Config) -> Workload:
    """The last tenth of the text is for the test."""
    text = read_text()
    characters = encode(text)
    train, test = characters.tensor_split([len(characters) * 9 // 10])
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Workload(
        model=Gpt(),
        train=Windows(train),
        test=Windows(test),
        loss=F.cross_entropy,
        classes=len(ALPHABET),
        bits_per="character",
        facts={"text": f"help topics of Python {platform.python_version()}, sha256 {digest[:16]}"},
    )
