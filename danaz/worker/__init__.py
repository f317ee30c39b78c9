"""One machine as one worker: its half of the protocol, its ranks, and its link to the server."""
