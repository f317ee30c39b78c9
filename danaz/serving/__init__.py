"""The server as a process: its socket, checkpoints, journal and recording."""
