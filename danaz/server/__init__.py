"""What the server decides: its core, the state that the core keeps, and the master's arithmetic. Without any I/O."""
