"""Reads the user's files and modules, with errors that name them."""
