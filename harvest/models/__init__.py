"""What a model is, how it is loaded, and what its text encoders and matrices say."""
