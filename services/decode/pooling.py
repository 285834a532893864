"""The pooling worker's process: a decode worker's sessions around an engine that answers in vectors and scores.

Its own role, and certificate: it may not claim tickets, and a generating worker can't pass for it.
"""

from __future__ import annotations

import sys

from inferflux.types import Role
from inferflux.worker.main import main as run_worker
from services.decode.__main__ import DecodePart


def main() -> int:
    """Run the worker; returns the exit code."""
    return run_worker(Role.POOLING, DecodePart)


if __name__ == "__main__":
    sys.exit(main())
