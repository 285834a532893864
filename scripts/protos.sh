#!/usr/bin/env bash
# generate: write inferflux/v1 from protos/. check: prove that it is what protos/ says, and that protos/ is in style.
set -euo pipefail
cd "$(dirname "$0")/.."

BIN=${VENV:-.venv}/bin

generate() { # into directory $1
    "$BIN/python" -m grpc_tools.protoc -Iprotos \
        --python_out="$1" --grpc_python_out="$1" \
        --plugin=protoc-gen-mypy="$BIN/protoc-gen-mypy" --mypy_out="quiet:$1" \
        --plugin=protoc-gen-mypy_grpc="$BIN/protoc-gen-mypy_grpc" --mypy_grpc_out="quiet:$1" \
        protos/inferflux/v1/*.proto
    touch "$1/inferflux/v1/__init__.py"
}

check() {
    "$BIN/buf" lint
    "$BIN/buf" format --diff --exit-code
    fresh=$(mktemp -d)
    trap 'rm -rf "$fresh"' EXIT
    generate "$fresh"
    if ! diff --recursive --brief --exclude=__pycache__ "$fresh/inferflux/v1" inferflux/v1; then
        echo "inferflux/v1 is not what protos/ says: run make protos" >&2
        exit 1
    fi
    echo "inferflux/v1 is current"
}

case ${1:-} in
    generate) generate . ;;
    check) check ;;
    *) echo "usage: $0 generate|check" >&2; exit 2 ;;
esac
