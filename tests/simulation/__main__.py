"""python -m tests.simulation --seeds 0:2000: simulate, print each seed that fails; --seed N -v replays one."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

from tests.simulation.scenario import Result, simulate


def main(argv: list[str]) -> int:
    """Simulate; exit status 1 when any seed fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", default="0:200", help="FROM:TO")
    parser.add_argument("--seed", type=int, help="one seed only")
    parser.add_argument("-v", "--verbose", action="store_true", help="print what happens")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--stop", action="store_true", help="stop at the first seed that fails")
    chosen = parser.parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if chosen.verbose else logging.CRITICAL, stream=sys.stdout, format="%(message)s"
    )
    first, last = map(int, chosen.seeds.split(":"))
    seeds = [chosen.seed] if chosen.seed is not None else range(first, last)
    started_at, counts, num_failed, num = time.monotonic(), Counter[str](), 0, 0
    with _simulator(chosen.jobs if chosen.seed is None else 1) as simulate_all:
        for result in simulate_all(simulate, seeds):
            num += 1
            counts.update(result.counts)
            num_failed += _tell(result, is_verbose=chosen.verbose)
            if num_failed and chosen.stop:
                break
    sys.stdout.write(f"{num} seeds, {num_failed} failed, {time.monotonic() - started_at:.1f} s; {dict(counts)}\n")
    return 1 if num_failed else 0


@contextmanager
def _simulator(num_jobs: int) -> Iterator[Any]:
    """Give a `map` over one or several processes."""
    if num_jobs == 1:
        yield map
        return
    with get_context("fork").Pool(num_jobs) as pool:
        yield pool.imap


def _tell(result: Result, *, is_verbose: bool) -> bool:
    if is_verbose or result.complaints:
        for line in [*(result.story if is_verbose else ()), *result.complaints]:
            sys.stdout.write(f"seed {result.seed}: {line}\n")
    return bool(result.complaints)


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of sets is part of a seed
        environ = {**os.environ, "PYTHONHASHSEED": "0"}
        os.execve(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]], environ)  # noqa: S606
    sys.exit(main(sys.argv[1:]))
