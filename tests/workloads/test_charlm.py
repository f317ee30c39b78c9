"""The small GPT: what it reads, what it may look at, and by which figure it is judged."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from shipped import shipped
from torch.utils.data import DataLoader

from danaz.workloads import build, collate
from danaz.workloads.charlm import ALPHABET, CONTEXT, Gpt, Windows, encode, read_text
from danaz.workloads.evaluate import final_figures


def text_of(windows: Windows) -> str:
    """Return the text that was cut into windows, without the last characters, which fill no window."""
    return "".join(ALPHABET[number] for number in windows.pieces[:, :-1].flatten().tolist())


class TestText:
    def test_every_process_reads_the_same_text(self) -> None:
        first, other = build(shipped("charlm")), build(shipped("charlm", "seed=9"))
        assert torch.equal(first.train.pieces, other.train.pieces)
        assert torch.equal(first.test.pieces, other.test.pieces)
        assert first.facts == other.facts

    def test_the_last_tenth_is_for_the_test(self) -> None:
        workload, text = build(shipped("charlm")), read_text()
        known = "".join(character if character in ALPHABET else ALPHABET[-1] for character in text)
        assert known.startswith(text_of(workload.train))
        assert text_of(workload.test) in known[-len(known) // 10 - 1 :]
        assert len(workload.train) + len(workload.test) > len(text) / CONTEXT - 3

    def test_nearly_every_character_is_in_the_alphabet(self) -> None:
        """The text of each version of Python has other characters; the alphabet is made for English."""
        characters = encode(read_text())
        assert len(characters) > 300_000
        assert (characters == len(ALPHABET) - 1).float().mean() < 0.01

    def test_the_target_is_the_next_character(self) -> None:
        windows = Windows(encode("abc" * CONTEXT))
        x, y = windows[1]
        assert (len(windows), len(x)) == (2, CONTEXT)
        assert [ALPHABET[number] for number in (*x[:4], y[3])] == ["b", "c", "a", "b", "c"]
        assert torch.equal(x[1:], y[:-1])
        batch = next(iter(DataLoader(windows, 2, collate_fn=collate)))
        assert torch.equal(batch[0][1], x)
        assert torch.equal(batch[1][1], y)


class TestGpt:
    def test_a_prediction_depends_only_on_what_was_read(self) -> None:
        torch.manual_seed(0)
        model = Gpt()
        text = torch.randint(len(ALPHABET), (1, CONTEXT))
        changed = text.clone()
        changed[0, 40] = (text[0, 40] + 1) % len(ALPHABET)
        with torch.no_grad():
            moved = (model(text) - model(changed)).abs().amax((0, 1))  # f32[CONTEXT]
        assert moved[:40].max() == 0
        assert (moved[40:] > 0).all()

    def test_at_first_each_character_is_as_likely_as_another(self) -> None:
        workload = build(shipped("charlm"))
        x, y = workload.test.__getitems__(range(8))
        assert workload.loss(workload.model(x), y).item() == pytest.approx(math.log(len(ALPHABET)), rel=0.05)

    def test_it_has_as_many_parameters_under_each_version_of_python(self) -> None:
        assert sum(parameter.numel() for parameter in Gpt().parameters()) == 110_400


def test_it_learns() -> None:
    """Thirty steps get from log 97 = 4.6 nats close to the entropy of single letters."""
    workload = build(shipped("charlm"))
    optimizer = torch.optim.AdamW(workload.model.parameters(), lr=4e-3)
    for step in range(30):
        x, y = workload.train.__getitems__(range(8 * step, 8 * step + 8))
        optimizer.zero_grad()
        workload.loss(workload.model(x), y).backward()
        optimizer.step()
    x, y = workload.test.__getitems__(range(20))
    with torch.no_grad():
        assert workload.loss(workload.model(x), y) < 3.6


def test_it_is_judged_by_bits_per_character() -> None:
    config = shipped("charlm")
    text = encode(read_text()[:5000])
    workload = replace(build(config), train=Windows(text), test=Windows(text))
    figures = final_figures(workload.model, workload, config, torch.device("cpu"))
    assert figures["test_loss"] == pytest.approx(math.log(len(ALPHABET)), rel=0.05)
    assert figures["test_bits_per_character"] == pytest.approx(figures["test_loss"] / math.log(2))
    assert 50 < figures["test_error_percent"] <= 100
    assert figures["text"].startswith("help topics of Python 3.")
