"""The one error of the installer: its text says what happened, what was expected, and what to do."""


class HorovodError(Exception):
    """Horovod could not be installed, or does not work. The text is for the user and names the cure."""
