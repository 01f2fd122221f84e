"""The documentation's site: `make docs` builds it from `docs/`, parsers of flags and docstrings."""
