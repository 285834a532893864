"""How long what runs will probably still take, judged by what is over. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def left_s(ages_s: Iterable[float], lengths_s: Sequence[float]) -> float | None:
    """Time until the last of those that run is over; None when nothing that is over tells.

    `ages_s`: of what runs; `lengths_s`: of what is over. Each takes as long as the longest that is over. What is older
    already will probably last as long again as it has (Lindy's law).
    """
    ages = tuple(ages_s)
    if not ages:
        return 0.0
    if not lengths_s:
        return None
    longest = max(lengths_s)
    return max(longest - age if age < longest else age for age in ages)
