"""Score matrices and what each feature does: one bounded pass over a store."""
