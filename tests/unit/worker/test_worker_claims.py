"""Claims over real gRPC and mutual TLS, against the real servicer on a real book."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from inferflux.engine.base import KvSource
from inferflux.errors import KvStale, TicketConflict, TicketExpired
from inferflux.kv.prefixes import PrefixStore
from inferflux.rpc.mtls import Identity
from inferflux.rpc.server import RpcServer
from inferflux.telemetry import metrics
from inferflux.tickets import Claimant, TicketState
from inferflux.types import KvReport
from inferflux.v1.prefill_service_pb2_grpc import add_PrefillServiceServicer_to_server
from inferflux.worker.claims import CLAIM_TIMEOUT_S, Claims
from inferflux.worker.leases import SessionLeases
from inferflux.worker.prefilling import Prefiller
from inferflux.worker.prefixes import PrefixTally
from services.prefill.servicer import CALLERS, PrefillServicer
from tests.support.books import SmallBook
from tests.support.service import temporary_home, until


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    with temporary_home() as home:
        yield home


@asynccontextmanager
async def owner(home: Path, incarnation: str = "one") -> AsyncIterator[tuple[SmallBook, str]]:
    """A prefill worker's ticket service and its address."""
    with SmallBook.of(128, incarnation) as small:
        leases = SessionLeases(small.book.expire_session)
        worker = cast("Any", SimpleNamespace(lifecycle=SimpleNamespace(incarnation=incarnation)))
        prefiller = Prefiller(worker, small.book, PrefixStore(small.arena), PrefixTally(), leases)
        server = RpcServer(Identity.load(home / "pki", "prefill"), f"unix:{home}/owner.sock", CALLERS)
        servicer = PrefillServicer(worker, prefiller, leases)
        add_PrefillServiceServicer_to_server(servicer, server.grpc)
        address = await server.start()
        try:
            yield small, address
        finally:
            await server.stop()


@asynccontextmanager
async def reader(home: Path, worker_id: str = "decode-0", timeout_s: float = 20) -> AsyncIterator[Claims]:
    """Claims of a decode worker; patient, as the machine may be busy."""
    claims = Claims(Identity.load(home / "pki", "decode"), Claimant(worker_id, "1"), timeout_s)
    try:
        yield claims
    finally:
        await claims.close()


def source(ticket_id: str, address: str, incarnation: str = "one") -> KvSource:
    return KvSource(ticket_id, b"", 1, (), (), 1, "", incarnation, (), address=address)


async def wait(sources: list[KvSource]) -> None:
    """Do what an engine does before it reads."""
    for each in sources:
        assert each.claim is not None
        await each.claim()


async def poll_answered(claims: Claims, asked: KvSource) -> None:
    """Claim until the owner answers: a connection that broke is made anew within a second."""
    orphans = value("inferflux_ticket_orphan_total")
    while True:
        await wait(claims.begin([asked]))
        if value("inferflux_ticket_orphan_total") == orphans:
            return
        orphans = value("inferflux_ticket_orphan_total")
        await asyncio.sleep(0.05)


def value(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0


async def test_a_ticket_is_granted_and_then_committed(home: Path) -> None:
    async with owner(home) as (small, address), reader(home) as claims:
        mine = [source(small.issue(), address)]
        begun = claims.begin(mine)
        await wait(begun)
        claimed = small.book.list()[0]

        claims.settle(begun, [KvReport(mine[0].ticket_id, "committed")])

        await until(lambda: small.book.list()[0].state == TicketState.COMMITTED)
        assert (claimed.state, claimed.claimant) == (TicketState.CLAIMED, "decode-0")


async def test_what_was_not_read_is_not_committed(home: Path) -> None:
    async with owner(home) as (small, address), reader(home) as claims:
        mine = [source(small.issue(), address) for _ in range(3)]
        begun = claims.begin(mine)
        await wait(begun)

        for one, result in zip(mine, ("recomputed", "unneeded", "committed"), strict=True):
            claims.settle(begun, [KvReport(one.ticket_id, result)])

        await until(lambda: small.book.list()[2].state == TicketState.COMMITTED)
        assert [record.state for record in small.book.list()[:2]] == [TicketState.CLAIMED] * 2


async def test_refusals_are_errors_of_their_kind(home: Path) -> None:
    async with (
        owner(home) as (small, address),
        reader(home) as first,
        reader(home, "decode-1") as second,
    ):
        ticket_id = small.issue()
        await wait(first.begin([source(ticket_id, address)]))

        for asked, error in (
            (source(ticket_id, address), TicketConflict),
            (source("unknown", address), TicketExpired),
            (source(ticket_id, address, "0ld"), KvStale),
        ):
            with pytest.raises(error):
                await wait(second.begin([asked]))


async def test_one_of_many_readers_wins_each_ticket(home: Path) -> None:
    """Racers with connections of their own, all at once."""
    async with owner(home) as (small, address):
        ids = [small.issue() for _ in range(100)]

        async def race(worker_id: str) -> set[str]:
            async with reader(home, worker_id) as claims:
                claimed = claims.begin([source(ticket_id, address) for ticket_id in ids])
                results = await asyncio.gather(*(wait([each]) for each in claimed), return_exceptions=True)
                assert all(result is None or isinstance(result, TicketConflict) for result in results)
                return {t for t, result in zip(ids, results, strict=True) if result is None}

        won = await asyncio.gather(*(race(f"decode-{i}") for i in range(8)))

        assert sorted(ticket_id for each in won for ticket_id in each) == sorted(ids)
        assert {record.ticket_id: record.claimant for record in small.book.list()} == {
            ticket_id: f"decode-{i}" for i, each in enumerate(won) for ticket_id in each
        }


async def test_claims_that_come_together_share_a_call(home: Path) -> None:
    def num_calls() -> float:
        return value("inferflux_rpc_seconds_count", method="/inferflux.v1.PrefillService/Claim", code="OK")

    async with owner(home) as (small, address), reader(home) as claims:
        before = num_calls()
        await wait([claims.begin([source(small.issue(), address)])[0] for _ in range(100)])

        assert num_calls() - before <= 2
        assert all(record.state == TicketState.CLAIMED for record in small.book.list())


async def test_an_owner_that_is_gone_does_not_stop_the_reader(home: Path) -> None:
    before = value("inferflux_ticket_orphan_total")
    async with reader(home, timeout_s=CLAIM_TIMEOUT_S) as claims:
        began_at = time.monotonic()
        await wait(claims.begin([source("t", f"unix:{home}/nobody.sock")]))

        assert time.monotonic() - began_at < 4 * CLAIM_TIMEOUT_S
    assert value("inferflux_ticket_orphan_total") == before + 1


async def test_an_owner_that_woke_up_after_its_successor_began_is_not_listened_to(home: Path) -> None:
    before = value("inferflux_version_regression_total", source="worker")
    async with owner(home, "one") as (_, address), reader(home) as claims:
        await wait(claims.begin([source("t", address, "two")]))

    assert value("inferflux_version_regression_total", source="worker") == before + 1


async def test_an_owner_that_was_started_anew_is_found_again(home: Path) -> None:
    async with reader(home) as claims:
        async with owner(home, "one") as (small, address):
            await wait(claims.begin([source(small.issue(), address)]))
        async with owner(home, "two") as (small, address):
            with pytest.raises(KvStale):
                await poll_answered(claims, source("t", address, "one"))
            await wait(claims.begin([source(small.issue(), address, "two")]))

            assert small.book.list()[0].state == TicketState.CLAIMED
