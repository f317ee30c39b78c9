"""What workers and the server say to each other."""
