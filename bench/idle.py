"""What an idle cluster costs: CPU share and memory of every process of a home.

    python -m bench.idle [--seconds 30]

Reads /proc for the processes whose INFERFLUX_HOME is this one's. Goal: less than 3% of one core in all.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

GOAL_PERCENT = 3.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def processes(home: str) -> dict[int, str]:
    """Process ids of a home, with their names; some write a title over their environment, so their log tells, too."""
    found = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            has_home = entry.name.isdigit() and f"INFERFLUX_HOME={home}\0".encode() in (entry / "environ").read_bytes()
            if has_home or (entry.name.isdigit() and str((entry / "fd/2").readlink()).startswith(f"{home}/")):
                found[int(entry.name)] = (entry / "comm").read_text().strip()
    found.pop(os.getpid(), None)
    return found


def cpu_s(pid: int) -> float:
    """CPU time of a process so far, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def rss_mb(pid: int) -> float:
    """Resident memory of a process, in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30)
    args = parser.parse_args()
    home = os.environ.get("INFERFLUX_HOME", str(Path.home() / ".inferflux"))
    names = processes(home)
    before, start = {pid: cpu_s(pid) for pid in names}, time.monotonic()
    time.sleep(args.seconds)
    elapsed = time.monotonic() - start
    rows = [
        {
            "pid": pid,
            "name": names[pid],
            "cpu_percent": 100 * (cpu_s(pid) - before[pid]) / elapsed,
            "rss_mb": rss_mb(pid),
        }
        for pid in names
    ]
    for row in rows:
        print(f"{row['pid']:>8} {row['name']:<16} {row['cpu_percent']:6.2f} % {row['rss_mb']:8.0f} MB")
    total = sum(float(row["cpu_percent"]) for row in rows)
    print(f"total {total:.2f} % of one core, goal {GOAL_PERCENT} %")
    print(json.dumps({"total_percent": total, "processes": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
