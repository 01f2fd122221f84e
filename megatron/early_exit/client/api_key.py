"""The key that a server asks for and its clients send."""

API_KEY_VARIABLE = "EARLY_EXIT_API_KEY"
"""Name of the environment variable that holds the API key."""
