"""Features against one another: where their directions point, and which of two dictionaries or steps fire together."""
