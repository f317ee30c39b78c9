"""How a model becomes one flat vector, and a vector becomes bytes."""
