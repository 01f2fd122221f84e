"""Asks the server in this container whether it can answer, at whatever port it listens.

    python health_check.py [PROCESS]

PROCESS is the server's process id, in a container 1. Exits with status 1, and says why, where there
is no answer or another one than 200."""

import sys
import urllib.error
import urllib.request

import psutil


def ports(process: psutil.Process) -> list[int]:
    """Where a process or one that it has started accepts connections."""
    family = [process, *process.children(recursive=True)]
    connections = (one for member in family for one in member.net_connections(kind="tcp"))
    return [one.laddr.port for one in connections if one.status == psutil.CONN_LISTEN]


def answers(port: int) -> bool:
    """Whether the server is well, by its own word at one of its ports."""
    try:
        with urllib.request.urlopen(f"http://localhost:{port}/health", timeout=4) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def main() -> int:
    """Returns the exit status."""
    found = ports(psutil.Process(int(sys.argv[1]) if len(sys.argv) > 1 else 1))
    if any(map(answers, found)):
        return 0
    where = f"at port {' or '.join(map(str, found))}" if found else "yet: no port is open"
    print(f"the server does not answer {where}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
