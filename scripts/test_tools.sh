#!/usr/bin/env bash
# Install what tests need beside .venv: an S3 server in a folder of its own, and Debian packages; without root, say which.
# With `checkov` only that: the tests of the chart want it, and it is large.
set -euo pipefail
cd "$(dirname "$0")/.."

# apart NAME PACKAGES...: install into a folder of its own, since these want other versions of what .venv has.
apart() {
    local target=$VENV/$1
    [[ -e $target/.ready ]] && return
    echo "==> installing $1 for the tests"
    rm -rf "$target"
    if ! "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet --no-input --target "$target" \
        "${@:2}" >"$target.log" 2>&1; then
        tail -20 "$target.log" >&2
        echo "could not install $1 for the tests" >&2
        exit 1
    fi
    touch "$target/.ready"
}

VENV=${VENV:-.venv}
if [[ ${1:-} == checkov ]]; then
    apart checkov 'checkov==3.3.30'
    exit 0
fi
apart s3-server 'moto[s3]==5.2.5' 'flask>=3.1,<4' 'flask-cors>=6,<7'

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
