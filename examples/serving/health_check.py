"""Asks the server in this container whether it can answer, wherever it listens.

    python health_check.py [PROCESS]

PROCESS is the server's process id, in a container 1. Exits with status 1, and says why, where there
is no answer or another one than 200."""

import http.client
import sys
import urllib.request

import psutil

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_TIMEOUT_S = 1.0
# A proxy for what the container asks of others knows nothing of this.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def addresses(process: psutil.Process) -> list[str]:
    """Where a process or one that it has started accepts connections, as in a URL."""
    found = []
    for member in (process, *process.children(recursive=True)):
        try:
            connections = member.net_connections(kind="tcp")
        except psutil.NoSuchProcess:
            continue
        for one in connections:
            if one.status == psutil.CONN_LISTEN:
                host = _WILDCARDS.get(one.laddr.ip, one.laddr.ip)
                found.append(
                    f"[{host}]:{one.laddr.port}" if ":" in host else f"{host}:{one.laddr.port}"
                )
    return found


def answers(address: str) -> bool:
    """Whether the server is well, by its own word at one of its addresses."""
    try:
        with _OPENER.open(f"http://{address}/health", timeout=_TIMEOUT_S) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def main() -> int:
    """Returns the exit status."""
    found = addresses(psutil.Process(int(sys.argv[1]) if len(sys.argv) > 1 else 1))
    if any(map(answers, found)):
        return 0
    where = f"at {' or '.join(found)}" if found else "yet: no port is open"
    print(f"the server does not answer {where}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
