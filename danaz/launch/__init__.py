"""How a run gets onto its machines."""
