"""Writes figures with their units."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return a time as people write it: 5.4 s, 3 min 10 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s} s"
    return f"{minutes // 60} h {minutes % 60} min"
