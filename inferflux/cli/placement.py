"""Which cores each worker computes on. Pure.

Prefill and decode never share a core when there are two: a long prompt would otherwise stall every running stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

Cores = tuple[int, ...]


def place(cores: Sequence[int], num_prefill: int, num_decode: int) -> tuple[list[Cores], list[Cores]]:
    """Return the cores of each prefill worker and of each decode worker; empty = not pinned (a single core)."""
    if len(cores) < 2:
        return [()] * num_prefill, [()] * num_decode
    half = len(cores) // 2 if num_prefill else 0
    return share(cores[:half], num_prefill), share(cores[half:], num_decode)


def share(cores: Sequence[int], num_workers: int) -> list[Cores]:
    """Split cores evenly; workers share cores only when there are too few."""
    if num_workers > len(cores):
        return [(cores[i % len(cores)],) for i in range(num_workers)]
    bounds = [len(cores) * i // num_workers for i in range(num_workers + 1)] if num_workers else []
    return [tuple(cores[a:b]) for a, b in pairwise(bounds)]
