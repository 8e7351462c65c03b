"""The report: a folder that opens from disk."""
