"""Read files and the user's modules, with errors that name them, and write files atomically."""
