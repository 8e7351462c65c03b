"""Which feature stands for what, where the truth is known."""
