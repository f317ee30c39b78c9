"""The options of a run: each is declared once."""
