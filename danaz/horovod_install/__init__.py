"""Build Horovod for the installed torch, keep the wheel, and check that it works."""
