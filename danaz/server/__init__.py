"""What the server decides: its core, what the core knows, and the master's arithmetic. Nothing here does any I/O."""
