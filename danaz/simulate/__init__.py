"""Many workers in one process: who pushes when, and what that does to training."""
