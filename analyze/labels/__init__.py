"""What people call the features: a label file beside each dictionary, and the command that edits it."""
