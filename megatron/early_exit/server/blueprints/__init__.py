"""The server's endpoints, one file for each kind."""
