"""python -m tests.mutants: put each historical failure into our code and require that a test notices it."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import subprocess
import sys
import time

from tests.chaos import corruption
from tests.mutants.catalogue import CORRUPTION, MUTANTS, NOT_YET, SIMULATION, Mutant
from tests.simulation.scenario import simulate

SEEDS = range(60)
CORRUPTIONS = 300
KILL_S = 400.0


def is_killed(mutant: Mutant, killer: str) -> str:
    """Try one killer in a process of its own; returns what it noticed, empty when nothing."""
    environ = {**os.environ, "IFX_MUTANT": mutant.name, "PYTHONHASHSEED": "0"}
    if killer in {SIMULATION, CORRUPTION}:
        command = [sys.executable, "-m", "tests.mutants", "--inside", killer]
    else:
        path, *more = killer.split(" ", 2)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "tests.mutants.plugin",
            path,
            *more,
            "--timeout=30",
        ]
        command += ["--no-header", "--tb=no", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=KILL_S, check=False)
    except subprocess.TimeoutExpired:
        return "it never ends"
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["?"]
    telling = next((line for line in lines if line.startswith(("FAILED", "ERROR", "seed"))), lines[-1])
    return telling[:110] if done.returncode == 1 else ""


def inside(killer: str) -> int:
    """Apply the mutant here and let a killer look; status 1 when it notices."""
    logging.disable(logging.CRITICAL)
    next(mutant for mutant in MUTANTS if mutant.name == os.environ["IFX_MUTANT"]).apply()
    if killer == CORRUPTION:
        outcomes = asyncio.run(corruption.run(CORRUPTIONS, 1))
        served, alarms = corruption.faults(outcomes)
        sys.stdout.write(f"{served} corruptions served, {alarms} alarms\n")
        return 1 if served or alarms else 0
    for seed in SEEDS:
        if complaints := simulate(seed).complaints:
            sys.stdout.write(f"seed {seed}: {complaints[0]}\n")
            return 1
    return 0


def main(argv: list[str]) -> int:
    """Try all, or those whose name has a text."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    if chosen.inside:
        return inside(chosen.inside)
    survivors = [mutant.name for mutant in MUTANTS if chosen.only in mutant.name and not _tell(mutant)]
    for name, why in NOT_YET.items():
        sys.stdout.write(f"not yet   {name}: {why}\n")
    sys.stdout.write(f"{len(survivors)} of {len(MUTANTS)} mutants live: {', '.join(survivors) or 'none'}\n")
    return 1 if survivors else 0


def _tell(mutant: Mutant) -> bool:
    began_at = time.monotonic()
    for killer in mutant.killers:
        if noticed := is_killed(mutant, killer):
            took_s = time.monotonic() - began_at
            sys.stdout.write(f"killed    {mutant.name} ({mutant.history}) by {killer} in {took_s:.0f} s: {noticed}\n")
            sys.stdout.flush()
            return True
    sys.stdout.write(f"SURVIVED  {mutant.name} ({mutant.history}): {', '.join(mutant.killers)} noticed nothing\n")
    sys.stdout.flush()
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
