"""The prefill worker's process."""

from __future__ import annotations

import asyncio
import sys

import grpc

from inferflux.clock import until_tick
from inferflux.kv.peers import Peers
from inferflux.process import Tasks
from inferflux.types import Role
from inferflux.v1.prefill_service_pb2_grpc import add_PrefillServiceServicer_to_server
from inferflux.worker.leases import SessionLeases
from inferflux.worker.ledger import Ledger
from inferflux.worker.main import Part
from inferflux.worker.main import main as run_worker
from inferflux.worker.prefilling import Prefiller
from inferflux.worker.worker import Worker
from services.prefill.servicer import CALLERS, PrefillServicer

SWEEP_S = 0.5
PEERS_S = 2.0


class PrefillPart(Part):
    """Tickets: issued by calls, ended by gateways, by the loss of their session, and by the sweeper."""

    callers = CALLERS

    def __init__(self, worker: Worker, tasks: Tasks) -> None:
        assert worker.book is not None  # noqa: S101 - for mypy: prefill workers have both
        assert worker.prefixes is not None  # noqa: S101
        assert worker.tally is not None  # noqa: S101
        self._book = worker.book
        self._leases = SessionLeases(self._book.expire_session)
        prefiller = Prefiller(worker, worker.book, worker.prefixes, worker.tally, self._leases)
        self._servicer = PrefillServicer(worker, prefiller, self._leases)
        self.ledger = Ledger(self._book, self._leases.is_alive)
        self._peers = Peers(worker.settings.arena_socket, worker.info.slot_bytes)
        worker.prefixes.elsewhere = self._peers
        if worker.settings.kv_prefix_cache:
            tasks.spawn(self._watch_peers(), "peers")

    @property
    def leases(self) -> SessionLeases:
        return self._leases

    def add_to(self, server: grpc.aio.Server) -> None:
        add_PrefillServiceServicer_to_server(self._servicer, server)

    async def run(self) -> None:
        """Sweep on a timer of its own: reclaiming must not depend on new work arriving."""
        while True:
            self._book.sweep()
            await asyncio.sleep(until_tick(SWEEP_S))

    async def _watch_peers(self) -> None:
        """Look for other prefill workers' arenas, in a thread: mapping one and asking a stopped process take time."""
        while True:
            await asyncio.to_thread(self._peers.refresh)
            await asyncio.sleep(until_tick(PEERS_S))

    async def wait_over(self) -> None:
        """Wait until no ticket is live: decode workers may still read from here."""
        while self._book.counts().live:  # noqa: ASYNC110 - the book is pure and tells nobody
            await asyncio.sleep(SWEEP_S / 10)

    async def close(self) -> None:
        self._servicer.close()
        self._leases.close()
        self._peers.close()
        self._book.revoke([record.ticket_id for record in self._book.list()])


def main() -> int:
    """Run the worker; returns the exit code."""
    return run_worker(Role.PREFILL, PrefillPart)


if __name__ == "__main__":
    sys.exit(main())
