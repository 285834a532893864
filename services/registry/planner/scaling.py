"""How many replicas a pool needs for its load. Pure, and monotone: more of all load never asks for fewer.

Each term is a number of replicas that one limit asks for; the largest term wins, then the bounds of the operator and of
the budget apply, whichever is lower. For prefill the tokens are those of prompts and the latency is the time to the
first token; for decode they are generated tokens and the time per output token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

RECENT_S = 120.0
QUEUE_SHARE = 0.5
"""Part of the latency goal that a prompt may spend in a queue; the rest is for its own computation."""
MAX_GROWTH = 2.0
"""How far a pool may be stretched at once for want of KV room: what waits has gathered, and will not come again."""
MAX_CORRECTION = 1.25
"""How far a missed latency goal alone may stretch a pool at once: it corrects the model above, a burst is no proof."""
MAX_REPLICAS = 4096
ROUNDING = 1e-9
"""Keeps 3.0000000001 replicas from becoming 4."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a pool has to do now, over all its replicas.

    `arrivals`: what arrived in the last hour, oldest first: a span in seconds and the tokens in it. `queued_tokens`:
    of prompts, accepted and not yet computed. `kv_demand`: share of the ready replicas' KV room that the requests need;
    above 1 when some wait for room. `latency_s`: what 9 of 10 requests got or better; None: nothing to go by.
    """

    num_ready: int = 0
    num_running: int = 0
    num_waiting: int = 0
    queued_tokens: float = 0.0
    arrivals: tuple[tuple[float, float], ...] = ()
    kv_demand: float = 0.0
    latency_s: float | None = None

    @property
    def tokens_per_s(self) -> float:
        """What arrives now, on the average of the last minutes."""
        return self._rate(RECENT_S)

    @property
    def mean_tokens_per_s(self) -> float:
        """What arrived on the average of all that is known."""
        return self._rate(math.inf)

    def _rate(self, last_s: float) -> float:
        known_s = num_tokens = 0.0
        for span_s, tokens in reversed(self.arrivals):
            known_s, num_tokens = known_s + span_s, num_tokens + tokens
            if known_s >= last_s:
                break
        return num_tokens / known_s if known_s else 0.0


@dataclass(frozen=True, slots=True)
class Slo:
    """What users are promised, and how full a replica may be while it is kept.

    `share`: of the tokens that must be in time. `tokens_per_s`, `num_sequences`: what one replica can do; 0 = unknown,
    and then the term is left out. `utilization`: the share of that to plan with; the rest is for what comes between two
    looks. `warm_up_s`: from the wish for a replica until it serves.
    """

    latency_s: float
    tokens_per_s: float = 0.0
    num_sequences: float = 0.0
    share: float = 0.95
    utilization: float = 0.85
    kv_utilization: float = 0.9
    warm_up_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Bounds. Prices are in any one currency; 0 = no bound. `max_per_million_tokens` is of the tokens that arrive."""

    min_replicas: int = 1
    max_replicas: int = 8
    per_hour: float = 0.0
    max_per_hour: float = 0.0
    max_per_million_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class Term:
    """What one limit asks for, and from what that follows."""

    name: str
    replicas: float
    why: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """`desired` replicas, the terms it is the largest of, and the bound that changed it ("" if none did)."""

    desired: int
    terms: tuple[Term, ...]
    bound: str = ""


def desired_replicas(load: Load, slo: Slo, cost: Cost) -> int:
    """Return how many replicas the load needs within the bounds."""
    return explain(load, slo, cost).desired


def explain(load: Load, slo: Slo, cost: Cost) -> Verdict:
    """Return the same number with all that led to it."""
    terms = tuple(term for term in _terms(load, slo) if term is not None)
    needed = math.ceil(max((term.replicas for term in terms), default=0.0) - ROUNDING)
    if needed <= cost.min_replicas:
        return Verdict(cost.min_replicas, terms, "min_replicas" if needed < cost.min_replicas else "")
    ceiling, bound = min(_ceilings(load, cost))
    if needed <= ceiling:
        return Verdict(needed, terms)
    return Verdict(max(ceiling, cost.min_replicas), terms, bound)


def _terms(load: Load, slo: Slo) -> tuple[Term | None, ...]:
    return _rate(load, slo), _backlog(load, slo), _sequences(load, slo), _kv(load, slo), _latency(load, slo)


def _rate(load: Load, slo: Slo) -> Term | None:
    """Replay what arrived: so many replicas would have been in time for the share of it that was promised."""
    if not slo.tokens_per_s:
        return None
    able, patience_s = slo.tokens_per_s * slo.utilization, slo.latency_s * QUEUE_SHARE
    replicas = _smallest(lambda n: _late_share(load.arrivals, n * able, patience_s) <= 1 - slo.share)
    why = f"{load.tokens_per_s:.0f} tokens/s arrive, in bursts; a replica should do {able:.0f}"
    return Term("rate", replicas, why)


def _backlog(load: Load, slo: Slo) -> Term | None:
    """Compute what waits already, beside what arrives, by the time that a new replica can have helped."""
    if not slo.tokens_per_s:
        return None
    span_s = slo.warm_up_s + slo.latency_s
    needed = load.tokens_per_s + load.queued_tokens / span_s
    why = f"{load.queued_tokens:.0f} prompt tokens wait, to be computed in {span_s:g} s beside what arrives"
    return Term("backlog", needed / slo.tokens_per_s, why)


def _late_share(arrivals: Iterable[tuple[float, float]], tokens_per_s: float, patience_s: float) -> float:
    """Share of the tokens that would have waited too long in one queue in front of so much speed."""
    queued = late = total = 0.0
    for span_s, tokens in arrivals:
        before, queued = queued, max(0.0, queued + tokens - tokens_per_s * span_s)
        in_time = tokens_per_s * (span_s + patience_s) - before
        late += min(tokens, max(0.0, tokens - in_time))
        total += tokens
    return late / total if total else 0.0


def _smallest(is_enough: Callable[[int], bool]) -> int:
    """Find the smallest number that is enough, where all above it are, too; limited to what exists."""
    high = 1
    while not is_enough(high) and high < MAX_REPLICAS:
        high *= 2
    low = high // 2  # not enough, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high if low or not is_enough(0) else 0


def _sequences(load: Load, slo: Slo) -> Term | None:
    """Have a place in a batch for each request."""
    if not slo.num_sequences:
        return None
    able, num_requests = slo.num_sequences * slo.utilization, load.num_running + load.num_waiting
    return Term("sequences", num_requests / able, f"{num_requests} requests, a replica should run {able:g}")


def _kv(load: Load, slo: Slo) -> Term:
    """Have room for their KV blocks."""
    why = (
        f"{load.kv_demand:.0%} of the KV room of {load.num_ready} replicas is needed, at most {slo.kv_utilization:.0%}"
    )
    return Term("kv", load.num_ready * min(MAX_GROWTH, load.kv_demand / slo.kv_utilization), why)


def _latency(load: Load, slo: Slo) -> Term | None:
    """Trust what users got more than any model of it."""
    if load.latency_s is None or load.latency_s <= slo.latency_s:
        return None
    why = f"9 of 10 requests got {load.latency_s:.3f} s with {load.num_ready} replicas, the goal is {slo.latency_s:g} s"
    return Term("latency", load.num_ready * min(MAX_CORRECTION, load.latency_s / slo.latency_s), why)


def _ceilings(load: Load, cost: Cost) -> list[tuple[int, str]]:
    """List what the operator and the budget allow at most."""
    ceilings = [(cost.max_replicas, "max_replicas")]
    if cost.per_hour and cost.max_per_hour:
        ceilings.append((int(cost.max_per_hour / cost.per_hour + ROUNDING), "max_per_hour"))
    if cost.per_hour and cost.max_per_million_tokens:
        earned_per_hour = load.mean_tokens_per_s * 3600 / 1e6 * cost.max_per_million_tokens
        ceilings.append((int(earned_per_hour / cost.per_hour + ROUNDING), "max_per_million_tokens"))
    return ceilings
