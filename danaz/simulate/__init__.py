"""The simulator: many workers in one process that take turns, through the same server core as a live run."""
