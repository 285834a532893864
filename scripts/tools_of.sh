#!/usr/bin/env bash
# tools_of.sh FOLDER: install what FOLDER/requirements.txt and FOLDER/package.json name into .venv/tools/NAME, once.
set -euo pipefail
cd "$(dirname "$0")/.."

# Apart from .venv: clients want other versions of what we use, and plugins of pytest would load into every test.
VENV=${VENV:-.venv}
WANTED=$1
TOOLS=$VENV/tools/$(basename "$WANTED")

if ! cmp --silent "$WANTED/requirements.txt" "$TOOLS/.ready"; then
    echo "==> installing the Python packages of $WANTED"
    rm -rf "$TOOLS"
    "$VENV/bin/python" -m venv "$TOOLS"
    "$TOOLS/bin/python" -m pip install --disable-pip-version-check --quiet --no-input 'uv>=0.13,<0.14'
    "$TOOLS/bin/uv" pip install --quiet --python "$TOOLS/bin/python" -r "$WANTED/requirements.txt"
    cp "$WANTED/requirements.txt" "$TOOLS/.ready"
fi
[[ -e $WANTED/package.json ]] || exit 0
if ! cmp --silent "$WANTED/package.json" "$TOOLS/node/.ready"; then
    command -v npm >/dev/null || { echo "npm not found: $WANTED needs Node 20 or newer" >&2; exit 1; }
    echo "==> installing the Node packages of $WANTED"
    rm -rf "$TOOLS/node"
    mkdir -p "$TOOLS/node"
    cp "$WANTED/package.json" "$TOOLS/node"
    npm install --prefix "$TOOLS/node" --no-audit --no-fund --loglevel=error
    cp "$WANTED/package.json" "$TOOLS/node/.ready"
fi
