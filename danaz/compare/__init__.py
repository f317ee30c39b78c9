"""Comparisons: the same experiment by several algorithms, numbers of workers and seeds, side by side."""
