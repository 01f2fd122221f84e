"""All changes that this package makes to torch or Megatron, one file for each change.

The docstring of a file says why the change is needed. Its functions make the change when they are
called, and raise a RuntimeError if the installed version does not have the expected target. Callers
decide which changes are made; this folder imports no other part of the package."""
