"""The decode worker's process."""

from __future__ import annotations

import asyncio
import sys

import grpc

from inferflux.process import Tasks
from inferflux.types import Role
from inferflux.v1.decode_service_pb2_grpc import add_DecodeServiceServicer_to_server
from inferflux.worker.answering import Answerer
from inferflux.worker.leases import SessionLeases
from inferflux.worker.main import Part
from inferflux.worker.main import main as run_worker
from inferflux.worker.sessions import Sessions
from inferflux.worker.worker import Worker
from services.decode.servicer import CALLERS, DecodeServicer


class DecodePart(Part):
    """Sessions."""

    callers = CALLERS

    def __init__(self, worker: Worker, tasks: Tasks) -> None:
        self._sessions = Sessions(Answerer(worker, worker.claims), tasks, worker.pulse)
        self._servicer = DecodeServicer(self._sessions, worker.lifecycle.incarnation)

    @property
    def leases(self) -> SessionLeases:
        return self._sessions.leases

    def add_to(self, server: grpc.aio.Server) -> None:
        add_DecodeServiceServicer_to_server(self._servicer, server)

    async def run(self) -> None:
        await asyncio.Event().wait()  # nothing happens but on a session's behalf

    async def wait_over(self) -> None:
        """Nothing outlives its request here."""

    async def close(self) -> None:
        await self._sessions.close("drained")


def main() -> int:
    """Run the worker; returns the exit code."""
    return run_worker(Role.DECODE, DecodePart)


if __name__ == "__main__":
    sys.exit(main())
