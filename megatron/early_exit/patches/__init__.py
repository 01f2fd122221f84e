"""Every change that this package makes to torch or Megatron, one file for each changed thing.

A file says why the thing is changed. Its functions make the change when they are called, and raise
a RuntimeError where the installed version does not have the thing as it is known here. Who wants a
change calls them: this room decides nothing, and imports nothing of the others."""
