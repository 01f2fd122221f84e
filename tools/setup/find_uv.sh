#!/usr/bin/env bash
# Prints the path of uv, installed into .venv-uv where it is not there yet. It resolves the lock for
# every system at once, and the lowest versions that pyproject.toml allows: pip can do neither. The
# setup itself needs pip alone.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$here/../../.venv-uv
if ! [[ -x $venv/bin/uv ]]; then
    "$(bash "$here/find_python.sh")" -m venv "$venv"
    "$venv/bin/python" -E -m pip install --quiet --disable-pip-version-check 'uv>=0.13,<0.14' >&2
fi
printf '%s\n' "$(cd "$venv" && pwd)/bin/uv"
