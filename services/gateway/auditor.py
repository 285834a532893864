"""Gets audit records to the policy service, by way of the disk when that is away.

Requests are noted in memory and never wait: when the policy service is away and the disk is full, the oldest records
are lost, and counted. An administrator's action is written down for good before it is done, in the policy service's log
or in the spool; when neither takes it, the action is refused.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import orjson

from inferflux.clock import Clock
from inferflux.errors import AuditUnavailable, InferfluxError, InvalidRequest
from inferflux.telemetry import metrics
from services.gateway.spool import Spool

FLUSH_S = 0.25
RETRY_S = 1.0
MAX_HELD = 10_000
BATCH = 500
Send = Callable[[list[bytes]], Awaitable[None]]
_log = logging.getLogger(__name__)


class Auditor:
    """All records of one gateway. `incarnation` makes their ids unique for ever."""

    def __init__(self, send: Send, spool: Spool, gateway_id: str, incarnation: str, clock: Clock) -> None:
        self._send = send
        self._spool = spool
        self._common = {"gateway": gateway_id}
        self._incarnation = incarnation
        self._numbers = itertools.count(1)
        self._clock = clock
        self._held: deque[bytes] = deque()
        self._noted = asyncio.Event()
        self._sending = asyncio.Lock()
        self._is_away = False

    def note(self, record: dict[str, Any]) -> None:
        """Write a record down soon."""
        if len(self._held) >= MAX_HELD:
            self._held.popleft()
            metrics.AUDIT_DROPPED.inc()
        self._held.append(self._stamp(record))
        self._noted.set()

    async def commit(self, record: dict[str, Any]) -> None:
        """Write a record down now. Raises AuditUnavailable."""
        async with self._sending:
            await self._store([self._stamp(record)])

    async def run(self) -> None:
        """Write down what is noted, and empty the spool when the policy service is there again, for ever."""
        while True:
            await self._wait()
            async with self._sending:
                await self._write_held()
                if not self._spool.is_empty:
                    await self._drain()
            await asyncio.sleep(RETRY_S if self._is_away else FLUSH_S)

    async def flush(self) -> None:
        """Write down what is held, at the end of the process."""
        async with self._sending:
            await self._write_held()

    async def _wait(self) -> None:
        """Wait for something to do: as long as the spool has something, that is to look after it."""
        if self._spool.is_empty:
            await self._noted.wait()

    async def _write_held(self) -> None:
        self._noted.clear()
        while self._held:
            batch = [self._held.popleft() for _ in range(min(BATCH, len(self._held)))]
            try:
                await self._store(batch)
            except AuditUnavailable:
                self._held.extendleft(reversed(batch))
                self._noted.set()
                return

    async def _store(self, records: list[bytes]) -> None:
        """Send records, or spool them. Raises AuditUnavailable."""
        if self._spool.is_empty and await self._sent(records):
            return
        try:
            await asyncio.to_thread(self._spool.put, records)
        except OSError as e:
            raise AuditUnavailable(f"neither the policy service nor the disk takes audit records: {e.strerror}") from e

    async def _drain(self) -> None:
        with suppress(OSError):
            while not self._spool.is_empty:
                records = await asyncio.to_thread(self._spool.peek)
                if records and not await self._sent(records):
                    return
                await asyncio.to_thread(self._spool.drop, records)

    async def _sent(self, records: list[bytes]) -> bool:
        try:
            await self._send(records)
        except InvalidRequest:
            _log.exception("the policy service refuses audit records")  # and always would: they must not block others
            metrics.AUDIT_DROPPED.inc(len(records))
        except InferfluxError as e:
            if not self._is_away:
                _log.warning("audit records go to the spool", extra={"reason": e.reason})
            self._is_away = True
            return False
        self._is_away = False
        return True

    def _stamp(self, record: dict[str, Any]) -> bytes:
        at = datetime.fromtimestamp(self._clock.time(), UTC).isoformat(timespec="milliseconds")
        stamp = {"id": f"{self._incarnation}-{next(self._numbers)}", "at": at}
        return orjson.dumps(stamp | self._common | record)
