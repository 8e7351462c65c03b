"""What others made: arrays of activations and prompts, and how they become a store (`store.foreign.importing` is the command)."""
