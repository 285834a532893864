"""The chaos harness itself, in small: a few proven faults on a real cluster, and nothing lost."""

from __future__ import annotations

import pytest

from tests.chaos.run import Chaos, Options

FAULTS = (
    "kill decode,xfer.read,stall decode,stall prefill,prefill.start:error,prefill.computed:kill,kill registry,leave"
)


@pytest.mark.timeout(180)
async def test_a_few_proven_faults_cost_no_request_and_no_token():
    """Each fault is proved, each request is answered exactly, and idle workers hold nothing afterwards."""
    async with Chaos(Options(faults=10, seconds=60, seed=3, gateways=1, prefill=1, only=FAULTS)) as chaos:
        report = await chaos.run()

    assert len(report.faults) >= 5, report.table()
    assert report.all_violations() == [], report.table()
    assert all(r.evidence for r in report.faults)
