"""What a run of chaos showed: JSON for machines, a table for people, and whether anything was violated."""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

VISIBLE_GAP_S = 0.1
"""A gap around a fault that is shorter is none: steps, batches and the machine's other work take that long."""


@dataclass(slots=True)
class Round:
    """One fault and everything that was judged after it. Times in seconds.

    `gaps`: of the streams that were open when it happened, the gap that it fell into. `recovery_s`: until the processes
    that died were ready again.
    """

    number: int
    fault: str
    evidence: list[str] = field(default_factory=list)
    is_void: bool = False
    num_requests: int = 0
    verdicts: dict[str, int] = field(default_factory=dict)
    num_resent: int = 0
    gaps: list[float] = field(default_factory=list)
    reclaim_s: float = 0.0
    recovery_s: float | None = None
    leaked_blocks: int = 0
    leaked_slots: int = 0
    leaked_tickets: int = 0
    violations: list[str] = field(default_factory=list)

    def line(self) -> str:
        """What happened, in a line."""
        verdicts = ", ".join(f"{n} {verdict}" for verdict, n in sorted(self.verdicts.items()))
        outcome = "void" if self.is_void else f"{len(self.violations)} violations" if self.violations else "fine"
        return f"round {self.number}: {self.fault}: {verdicts}; reclaimed in {self.reclaim_s:.2f} s: {outcome}"


@dataclass(slots=True)
class Report:
    """A whole run."""

    engine: str
    seed: int
    rounds: list[Round] = field(default_factory=list)
    num_mismatches: int = 0
    live_arena_bytes: int = 0
    leaked_arena_bytes: int = 0
    leaked_fds: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def faults(self) -> list[Round]:
        """The rounds whose fault is proved."""
        return [r for r in self.rounds if not r.is_void]

    def all_violations(self) -> list[str]:
        """Everything that must not be."""
        inside = [f"round {r.number} ({r.fault}): {text}" for r in self.rounds for text in r.violations]
        outside = [*self.violations, *self.leaked_fds]
        if self.leaked_arena_bytes:
            outside.append(f"{self.leaked_arena_bytes} bytes of dead workers' arenas are still mapped")
        return inside + outside

    def document(self) -> dict[str, Any]:
        """Everything, for machines."""
        return {
            "engine": self.engine,
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "summary": self.summary(),
            "violations": self.all_violations(),
            "rounds": [asdict(r) for r in self.rounds],
        }

    def summary(self) -> dict[str, Any]:
        """The numbers that count."""
        faults = self.faults
        verdicts = Counter[str]()
        for r in faults:
            verdicts.update(r.verdicts)
        return {
            "faults": len(faults),
            "void": len(self.rounds) - len(faults),
            "requests": sum(r.num_requests for r in faults),
            "verdicts": dict(sorted(verdicts.items())),
            "sent again by the client": sum(r.num_resent for r in faults),
            "lost": sum(n for verdict, n in verdicts.items() if verdict not in {"ok", "left"}),
            "inexact": sum("inexact" in text for r in faults for text in r.violations),
            "leaked blocks": sum(r.leaked_blocks for r in faults),
            "leaked slots": sum(r.leaked_slots for r in faults),
            "leaked tickets": sum(r.leaked_tickets for r in faults),
            "leaked arena bytes": self.leaked_arena_bytes,
            "leaked fds": len(self.leaked_fds),
            "stream gap, decode worker killed, s": spread(visible_gaps(faults, "kill")),
            "stream gap, decode worker drained, s": spread(visible_gaps(faults, "drain")),
            "stream gap, decode worker hung, s": spread(visible_gaps(faults, "hang")),
            "reclaim, s": spread(r.reclaim_s for r in faults if "gateway" not in r.fault),
            "reclaim after the gateway, s": spread(r.reclaim_s for r in faults if "gateway" in r.fault),
            "recovery, s": spread(r.recovery_s for r in faults if r.recovery_s is not None),
            "violations": len(self.all_violations()),
        }

    def save(self, path: Path) -> None:
        """Write the JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.document(), indent=1))

    def table(self) -> str:
        """Everything that people want to see."""
        rows = [("fault", "n", "void", "requests", "not ok", "gap max", "reclaim max", "recovery max", "violations")]
        for name, rounds in sorted(_by_fault(self.rounds).items()):
            rows.append(_row(name, rounds))
        lines = _aligned(rows)
        summary = [f"{key:38} {value}" for key, value in self.summary().items()]
        return "\n".join([*lines, "", *summary, "", *self.all_violations()[:50]])


def visible_gaps(rounds: Iterable[Round], how: str) -> list[float]:
    """The gaps of streams whose decode worker was taken away in one way, so that they had to move."""
    ways = [r for r in rounds if "decode" in r.fault and how in r.fault]
    return [gap for r in ways for gap in r.gaps if gap >= VISIBLE_GAP_S]


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum."""
    ordered = sorted(values)
    if not ordered:
        return {"n": 0}
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return {
        "n": len(ordered),
        "p50": round(statistics.median(ordered), 3),
        "p99": round(p99, 3),
        "max": round(ordered[-1], 3),
    }


def _by_fault(rounds: Iterable[Round]) -> dict[str, list[Round]]:
    groups: dict[str, list[Round]] = defaultdict(list)
    for r in rounds:
        groups[r.fault].append(r)
    return groups


def _row(name: str, rounds: Sequence[Round]) -> tuple[str, ...]:
    proved = [r for r in rounds if not r.is_void]
    bad = sum(n for r in proved for verdict, n in r.verdicts.items() if verdict not in {"ok", "left"})
    return (
        name,
        str(len(proved)),
        str(len(rounds) - len(proved)),
        str(sum(r.num_requests for r in proved)),
        str(bad),
        _max(gap for r in proved for gap in r.gaps),
        _max(r.reclaim_s for r in proved),
        _max(r.recovery_s for r in proved if r.recovery_s is not None),
        str(sum(len(r.violations) for r in proved)),
    )


def _max(values: Iterable[float]) -> str:
    top = max(values, default=None)
    return "" if top is None else f"{top:.2f}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
