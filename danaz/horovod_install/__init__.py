"""Build Horovod for the torch at hand, keep the wheel, and check that it works."""
