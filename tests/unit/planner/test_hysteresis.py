from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from services.registry.planner.hysteresis import Hysteresis

HOLD_S = 600.0
PERIOD_S = 5.0
needs = st.lists(st.integers(1, 20), min_size=1, max_size=400)


def sizes(wanted: list[int], first: int = 1) -> list[int]:
    """Let a pool follow what is wanted, looked at each 5 s."""
    memory, size, result = Hysteresis(), first, []
    for i, needed in enumerate(wanted):
        size = memory.target(i * PERIOD_S, size, needed, HOLD_S)
        result.append(size)
    return result


def turns(result: list[int]) -> list[tuple[int, bool]]:
    """Looks at which the size changed its direction, and whether upwards."""
    moves = [(i, after > before) for i, (before, after) in enumerate(pairwise(result)) if after != before]
    return [(i, is_up) for (_, was_up), (i, is_up) in pairwise(moves) if was_up is not is_up]


@given(needs)
def test_what_is_needed_is_there(wanted: list[int]) -> None:
    assert all(size >= needed for size, needed in zip(sizes(wanted), wanted, strict=True))


@given(needs, st.integers(1, 30))
def test_nothing_is_bigger_than_what_was_needed_lately(wanted: list[int], first: int) -> None:
    """Once somebody has watched for that long."""
    num_looks = int(HOLD_S / PERIOD_S)
    for i, size in enumerate(sizes(wanted, first)):
        if i >= num_looks:
            assert size <= max(wanted[i - num_looks : i + 1])


@given(needs)
def test_no_flapping(wanted: list[int]) -> None:
    """A pool that grew shrinks no earlier than the hold after it needed that size: never two turns down within it."""
    downwards = [i for i, is_up in turns(sizes(wanted)) if not is_up]

    assert all((b - a) * PERIOD_S >= HOLD_S for a, b in pairwise(downwards))


def test_a_need_that_comes_and_goes_changes_nothing() -> None:
    """Every 100 s a burst: the pool grows once and stays."""
    result = sizes(([3] * 10 + [1] * 10) * 20)

    assert set(result) == {3}


def test_a_pool_shrinks_when_the_hold_is_over() -> None:
    result = sizes([5] + [2] * 200)

    assert result[119] == 5
    assert result[120] == 2


def test_a_new_leader_lets_nothing_shrink_at_first() -> None:
    """It does not know what was needed before it looked."""
    result = sizes([2] * 200, first=7)

    assert result[:120] == [7] * 120
    assert result[-1] == 2
