"""Wrong KV is never served, right KV always is; see tests/chaos/corruption.py."""

from __future__ import annotations

from tests.chaos.corruption import CLEAN, MUTATIONS, faults, run


async def test_no_corruption_is_served_and_no_clean_transfer_is_refused():
    """All kinds of corruption are tried, each many times."""
    outcomes = await run(2_000, seed=7)

    assert {name for name, _ in outcomes} == {*MUTATIONS, CLEAN}
    assert faults(outcomes) == (0, 0), outcomes
