"""python -m tests.chaos: run chaos and say what it showed. Exit status 1 when anything was violated."""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import fields
from pathlib import Path

from tests.chaos.report import Report, Round
from tests.chaos.run import Chaos, Options


async def run(options: Options) -> Report:
    """Run it."""
    async with Chaos(options) as chaos:
        return await chaos.run(tell)


def tell(done: Round) -> None:
    """Say how a round went."""
    sys.stdout.write(done.line() + "\n")
    sys.stdout.flush()


def parse(argv: list[str]) -> tuple[Options, Path]:
    """Read the flags: one for each option, and --report."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    for option in fields(Options):
        kind = {"int": int, "float": float, "str": str}[str(option.type)]
        parser.add_argument(f"--{option.name}", type=kind, default=option.default, help=f"default: {option.default!r}")
    parser.add_argument("--report", type=Path, default=Path("build/chaos.json"), help="where the JSON goes")
    chosen = vars(parser.parse_args(argv))
    report: Path = chosen.pop("report")
    return Options(**chosen), report


def main(argv: list[str]) -> int:
    """Run and report."""
    options, path = parse(argv)
    report = asyncio.run(run(options))
    report.save(path)
    sys.stdout.write(f"{report.table()}\n\nreport: {path}\n")
    num_faults, num_bad = len(report.faults), len(report.all_violations())
    sys.stdout.write(f"{num_faults} faults in {report.seconds:.0f} s, {num_bad} violations\n")
    return 1 if num_bad or not num_faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
