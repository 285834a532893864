#!/usr/bin/env bash
# Install what tests need beside .venv: an S3 server in a folder of its own, and Debian packages; without root, say which.
set -euo pipefail
cd "$(dirname "$0")/.."

# Apart from .venv: boto3 wants an older python-dateutil than kubernetes does.
VENV=${VENV:-.venv}
S3=$VENV/s3-server
if [[ ! -e $S3/.ready ]]; then
    echo "==> installing moto, the S3 server of the tests"
    rm -rf "$S3"
    if ! "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet --no-input --target "$S3" \
        'moto[s3]==5.2.5' 'flask>=3.1,<4' 'flask-cors>=6,<7' >"$VENV/s3-server.log" 2>&1; then
        tail -20 "$VENV/s3-server.log" >&2
        echo "could not install the S3 server of the tests" >&2
        exit 1
    fi
    touch "$S3/.ready"
fi

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
