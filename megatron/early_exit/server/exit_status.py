"""How the server's process ends, for those that decide whether to start it again."""

import errno
import socket

from megatron.early_exit.inference.decoding.failures import is_out_of_memory

LOST = 1
"""The engine is lost, or there is an error in the program."""
CONFIGURATION = 2
"""A flag or what it names cannot be used, and will not the next time either."""
FOR_NOW = 75
"""It could not start now, but may the next time: the port or memory is taken (`EX_TEMPFAIL`)."""
_LASTING = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.EINVAL,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EAFNOSUPPORT,
}


def status_of(error: Exception) -> int:
    """The status for an error at the start."""
    if is_out_of_memory(error):
        return FOR_NOW
    if isinstance(error, ValueError):
        return CONFIGURATION
    if isinstance(error, OSError):
        number = error.errno or 0
        # Negative ones are of names that cannot be resolved.
        is_lasting = number in _LASTING or (number < 0 and number != socket.EAI_AGAIN)
        return CONFIGURATION if is_lasting else FOR_NOW
    return LOST
