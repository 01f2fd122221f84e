#!/usr/bin/env bash
# Prints the path of a Python interpreter that the project can run on. Looks on the PATH, then among
# pyenv's versions; PYTHON=/path/to/python names the one to take. Finding none, it says on standard
# error what it passed over and what to install, and exits with status 1.
set -uo pipefail

# Megatron-Core publishes wheels for these versions only. The first found of the first one is taken;
# SUPPORTED_PYTHON orders them otherwise.
supported="3.12 3.13"
supported=${SUPPORTED_PYTHON:-$supported}

# Old interpreters must be able to read this too.
probe='
import os, sys
version = "%d.%d" % sys.version_info[:2]
path = sys.executable
try:
    import ctypes, ensurepip, ssl, venv
except ImportError as error:
    version += " without " + str(error).split("\x27")[-2]
else:
    base = os.path.join(getattr(sys, "base_prefix", sys.prefix), "bin", "python" + version)
    path = base if os.path.exists(base) else path
print(version)
print(path)
'

# Every interpreter that might do, best guesses first, one path a line.
candidates() {
    local name folder root
    for name in python3.12 python3.13 python3 python; do
        type -ap "$name"
    done
    # A shim on the PATH refuses to run where its version is not selected: look behind it.
    {
        printf '%s\n' "${PYENV_ROOT:-}" "${HOME:+$HOME/.pyenv}"
        tr ':' '\n' <<<"${PATH:-}" | sed -n 's:/shims/*$::p'
    } | while IFS= read -r root; do
        [[ -n $root ]] || continue
        for folder in "$root"/versions/*; do
            [[ -x $folder/bin/python ]] && printf '%s\n' "$folder/bin/python"
        done
    done
}

if [[ -n ${PYTHON:-} ]]; then
    list=$PYTHON
else
    list=$(candidates | awk '!seen[$0]++')
fi

best=""
best_version=""
passed_over=""
while IFS= read -r candidate; do
    [[ -n $candidate ]] || continue
    answer=$("$candidate" -E -c "$probe" 2>/dev/null </dev/null) || answer="does not run"
    version=${answer%%$'\n'*}
    path=${answer#*$'\n'}
    case " $supported " in
        *" $version "*)
            if [[ -z $best || ($version == "${supported%% *}" && $version != "$best_version") ]]; then
                best=$path
                best_version=$version
            fi
            [[ $version == "${supported%% *}" ]] && break
            ;;
        *)
            [[ $version == [0-9]* ]] && version="Python $version"
            passed_over+="  $candidate: $version"$'\n'
            ;;
    esac
done <<<"$list"

if [[ -n $best ]]; then
    printf '%s\n' "$best"
    exit 0
fi

{
    echo "error: found no Python that can run this project; it needs version ${supported// / or }."
    [[ -z $passed_over ]] || printf 'Passed over:\n%s' "$passed_over"
    cat <<'MESSAGE'
Install one, for instance with
  Debian, Ubuntu:  apt install python3.12 python3.12-venv
  Fedora:          dnf install python3.12
  pyenv:           pyenv install 3.12
  uv:              uv python install 3.12
  conda:           conda create --name early-exit python=3.12, then conda activate early-exit
and repeat the command, or name an interpreter: make setup PYTHON=/path/to/python3.12
MESSAGE
} >&2
exit 1
