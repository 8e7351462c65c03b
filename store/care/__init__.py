"""Looks after a store: verify, repair, diff, rm."""
