"""The client of the server; it needs neither torch nor a checkpoint."""
