"""The server as a process: sockets, checkpoints, the journal and the recording."""
