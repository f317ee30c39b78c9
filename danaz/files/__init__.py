"""How files and modules of the user's are read, with errors that name them."""
