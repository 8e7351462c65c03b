"""What a harvest will do and take, settled and said before it costs anything."""
