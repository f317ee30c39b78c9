"""Comparisons: one experiment run with several algorithms, numbers of workers and seeds, side by side."""
