"""The scripts of examples/, and how well each trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True)
class Example:
    """A script, and the bound for a figure that it reports. A script whose training is broken misses it by far."""

    script: str
    figure: str
    least: float | None = None
    most: float | None = None
    arguments: tuple[str, ...] = ()
    is_slow: bool = False  # even alone

    @property
    def path(self) -> Path:
        return FOLDER / self.script

    def check(self, figures: dict[str, float]) -> None:
        """Raise AssertionError if the script has not trained."""
        value = figures[self.figure]
        assert self.least is None or value >= self.least, f"{self.figure} is {value}, expected {self.least} or more"
        assert self.most is None or value <= self.most, f"{self.figure} is {value}, expected {self.most} or less"


EXAMPLES = [
    Example(
        "train_digits.py", "test_error_percent", most=8, arguments=("--epochs", "4"), is_slow=True
    ),  # untrained: 90
    Example("train_cnn.py", "test_accuracy_percent", least=90, arguments=("--epochs", "5")),  # untrained: 10
    Example("finetune.py", "test_accuracy_percent", least=80),  # untrained: 20; the head alone comes to 85
    Example(
        "train_gpt.py", "test_bits_per_character", most=5.0, arguments=("--steps", "60"), is_slow=True
    ),  # untrained: 6.5
    Example("train_stream.py", "test_accuracy_percent", least=80),  # untrained: 50
    Example("train_gan.py", "energy_distance", most=0.15, is_slow=True),  # untrained: 1.6
]
