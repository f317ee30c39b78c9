"""The configurations that come with danaz."""

from __future__ import annotations

from pathlib import Path

from danaz.run.config import Config, load_config

CONFIGS = Path(__file__).parents[2] / "configs"


def shipped(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / f"{name}.yaml", overrides)
