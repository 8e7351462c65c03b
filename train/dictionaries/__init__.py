"""Dictionaries: what they are, how they lie on disk, and those that others published."""
