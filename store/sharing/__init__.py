"""Brings stores, packs, dictionaries and results to others and back: push, pull, and parts of stores."""
