#!/usr/bin/env bash
# Install the Debian packages that tests need beside .venv; without root, say which.
set -euo pipefail

command -v redis-server >/dev/null && exit 0
how="apt-get install --no-install-recommends redis-server"
if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "redis-server not found: the store tests run on a real Redis >= 7.0. Install it: $how" >&2
    exit 1
fi
echo "==> installing redis-server for the store tests"
# Run level 1: the package must not start a server of its own.
export RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { apt-get update && apt-get install --yes --no-install-recommends redis-server; } >"$log" 2>&1; then
    tail -20 "$log" >&2
    echo "could not install redis-server; try: $how" >&2
    exit 1
fi
