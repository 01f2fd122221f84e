"""What talks to the server: it needs neither torch nor a checkpoint."""
