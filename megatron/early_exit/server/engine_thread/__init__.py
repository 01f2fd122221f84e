"""The thread that owns the engine, the jobs that requests give it, and its figures."""
