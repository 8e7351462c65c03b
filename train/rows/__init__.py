"""Rows of a pack: read ahead, permuted, converted or recomputed, and how well they are mixed."""
