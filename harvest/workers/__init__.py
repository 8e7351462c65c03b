"""Many processes on one store: which of them this one is, what it says of itself, and who is there."""
