"""What features look like: heat over pictures, highlighted words, sheets."""
