"""Check whether the server in this container answers requests, at whatever address it listens.

    python health_check.py [PROCESS]

PROCESS is the server's process id (default: 1, as in a container). The exit status is 1, with a
message that says why, if the server does not answer with status 200."""

import http.client
import sys
import urllib.request

import psutil

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_TIMEOUT_S = 1.0
# A proxy for what the container asks of others knows nothing of this.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def addresses(process: psutil.Process) -> list[str]:
    """The addresses, as in a URL, at which a process or one that it has started accepts
    connections."""
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
    """Whether the server says at this address that it answers requests."""
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
