"""What a training found: figures on held-out rows, logs, pictures, the table of a sweep."""
