#!/usr/bin/env bash
# Makes sure that there is a Chromium, which the tests of the server's page drive, and prints its
# path. Installs it only where that needs no question: on Debian or Ubuntu, as root.
set -euo pipefail

find_browser() {
    command -v chromium || command -v chromium-browser || command -v google-chrome
}

if find_browser; then exit 0; fi

if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    echo "Installing Chromium for the tests of the server's page" >&2
    if log=$({ apt-get update && DEBIAN_FRONTEND=noninteractive \
        apt-get install --yes --no-install-recommends chromium; } 2>&1) && find_browser; then
        exit 0
    fi
    tail -n 5 <<<"$log" >&2
fi

echo "error: the tests of the server's page need Chromium: install chromium or google-chrome" \
    "(Debian: apt-get install chromium)" >&2
exit 1
