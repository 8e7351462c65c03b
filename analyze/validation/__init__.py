"""Whether attribution graphs say what the model does: the nodes they name, perturbed in the model itself.  Runs the model again."""
