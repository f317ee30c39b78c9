"""The error of the installer."""


class HorovodError(Exception):
    """Horovod could not be installed, or does not work. The message says what happened and what to do."""
