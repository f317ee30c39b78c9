"""Lay a model out as one flat vector, cut the vector into slices, and turn slices into bytes."""
