"""One model in training: forward pass, loss, dead features, optimizer."""
