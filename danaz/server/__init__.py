"""The server: a core without I/O, the master's arithmetic, the wire, and the ROUTER loop around them."""
