"""Whether a canary is worse than what it would replace: decided from counts alone.

A few failures among a few requests prove nothing, so the canary's failure rate is taken at the lower end of its 95%
confidence interval (Wilson's score interval, one-sided).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

MIN_REQUESTS = 10
Z = 1.645
"""Standard normal quantile of 95%."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Requests that ended under one document, and those of them that ended in an error."""

    num_requests: int = 0
    num_failures: int = 0

    def __add__(self, other: Outcomes) -> Outcomes:
        return Outcomes(self.num_requests + other.num_requests, self.num_failures + other.num_failures)

    @property
    def rate(self) -> float:
        """Share of failures; 0 without requests."""
        return self.num_failures / self.num_requests if self.num_requests else 0.0

    @property
    def rate_at_least(self) -> float:
        """What the true share of failures is not below, in 95 of 100 cases."""
        n, z2 = self.num_requests, Z * Z
        if not n:
            return 0.0
        half = Z * sqrt(self.rate * (1 - self.rate) / n + z2 / (4 * n * n))
        return max(0.0, (self.rate + z2 / (2 * n) - half) / (1 + z2 / n))


def objection(candidate: Outcomes, live: Outcomes, max_error_excess: float) -> str:
    """Say why a canary must be reverted; empty: it need not."""
    if candidate.num_requests < MIN_REQUESTS or candidate.rate_at_least <= live.rate + max_error_excess:
        return ""
    failed = f"{candidate.num_failures} of {candidate.num_requests} requests failed"
    return f"{failed} ({candidate.rate:.1%}), of the others {live.rate:.1%}; at most {max_error_excess:.1%} more may"
