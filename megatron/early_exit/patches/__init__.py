"""Every change that this package makes to torch or Megatron, one file for each changed thing.

A file says why the thing is changed. It changes it with `replace`, which first checks that the
thing still is what the change was written for. Who wants a change calls it; this room decides
nothing, and imports nothing of the rooms above."""
