"""From flags to checked arguments, and sentences about those that cannot work."""
