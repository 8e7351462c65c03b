"""Circuit-guided steering: the sources that graphs name, changed beside as many other features, and judged.  Runs the model again."""
