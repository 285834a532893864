"""Seeds of the virtual-time simulation; `python -m tests.simulation --seeds 0:2000` runs many more."""

from __future__ import annotations

import pytest

from tests.simulation.scenario import simulate

# Tickets of a worker that hung while they were given back: kept until their lease ended, once.
FOUND_BUGS = (102, 215)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", [*range(10), *FOUND_BUGS])
def test_every_request_ends_once_and_exactly_and_nothing_is_held(seed: int):
    """Crashes, hangs, drains, partitions and a lost registry leave one usable path, and that is enough."""
    assert simulate(seed).complaints == []
