"""How the server's process ends, for those that decide whether to start it again."""

import errno
import socket

from megatron.early_exit.inference.engine.failures import is_out_of_memory

EXIT_FAILURE = 1
"""The engine is lost, or there is an error in the program."""
EXIT_CONFIGURATION = 2
"""A flag or what it names cannot be used, and will not the next time either."""
EXIT_TEMPORARY = 75
"""It could not start now, but may the next time: the port or memory is taken (`EX_TEMPFAIL`)."""
_PERMANENT_ERRNOS = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM),
    *(errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG, errno.EAFNOSUPPORT),
}


def exit_status_of(error: Exception) -> int:
    """The status for an error at the start.

    Memory that is used up comes first, since systems report it as errors of several kinds.
    """
    if is_out_of_memory(error):
        return EXIT_TEMPORARY
    if isinstance(error, ValueError):
        return EXIT_CONFIGURATION
    if isinstance(error, OSError):
        number = error.errno or 0
        # Negative ones are of names that cannot be resolved.
        is_permanent = number in _PERMANENT_ERRNOS or (number < 0 and number != socket.EAI_AGAIN)
        return EXIT_CONFIGURATION if is_permanent else EXIT_TEMPORARY
    return EXIT_FAILURE
