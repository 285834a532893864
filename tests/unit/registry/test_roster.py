"""Rosters and workers read back, or not at all."""

from __future__ import annotations

import pytest

from inferflux.errors import InvalidRequest
from services.registry.roster import Roster
from tests.unit.registry.records import worker


def test_a_roster_reads_back():
    """Every field of every worker."""
    roster = Roster(7, (worker(reason="é", host_id="h", engine="sim", max_model_len=9), worker("p-0")), {"x": "000-a"})

    assert Roster.decode(roster.encode()) == roster


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"beat": 1, "workers": [{}], "gone": {}}',
        '{"beat": 1, "workers": 3, "gone": {}}',
        '{"beat": 1, "workers": [], "gone": []}',
        '{"beat": "x", "workers": [], "gone": {}}',
        Roster(1, (worker(),), {}).encode().replace("unix:/tmp/d.sock", "elsewhere"),
        Roster(1, (worker(),), {}).encode().replace('"decode"', '"planner"'),
    ],
)
def test_garbage_is_no_roster(text):
    """Someone else's data under our name must not stop the service."""
    assert Roster.decode(text) is None


@pytest.mark.parametrize(
    "bad",
    [
        {"worker_id": ""},
        {"worker_id": "a/b"},
        {"incarnation": ""},
        {"address": ""},
        {"address": "host"},
        {"address": "unix:relative"},
        {"address": "http://host:1"},
    ],
)
def test_bad_workers_are_refused(bad):
    """The field is named."""
    with pytest.raises(InvalidRequest) as caught:
        worker(**bad)

    assert caught.value.param == next(iter(bad))


@pytest.mark.parametrize("address", ["unix:/run/d.sock", "10.0.0.1:5000", "[::1]:5000", "decode-0.pool.svc:5000"])
def test_good_addresses_are_accepted(address):
    """Targets of gRPC, as workers bind them."""
    assert worker(address=address).address == address
