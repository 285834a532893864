"""One stream to one worker, kept open for ever: opened, read until it breaks, opened again.

Both kinds of worker send pulses on such a stream. While it is up the worker can be used; when it breaks, everything
that depended on it is told at once.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from typing import Any

import grpc

from inferflux.errors import InferfluxError
from inferflux.rpc.client import num_cancels, to_error
from inferflux.telemetry import metrics
from inferflux.types import STATE_FROM_PROTO, Pulse, Role, State
from inferflux.v1 import types_pb2
from inferflux.v1.worker_admin_service_pb2_grpc import WorkerAdminServiceStub
from services.gateway.heart import Heart
from services.gateway.poison import Inquest
from services.gateway.snapshots import backoff_s
from services.gateway.views import Worker

_log = logging.getLogger(__name__)


class Link(ABC):
    """The connection to one worker. `run` once, as a task; cancelling it closes everything.

    `num_assigned`: requests that this gateway has routed to the worker and that are not over there. `admin`: the
    worker's WorkerAdminService.
    """

    role: Role

    def __init__(self, worker: Worker, channel: grpc.aio.Channel, heart: Heart, inquest: Inquest) -> None:
        self.worker_id = worker.worker_id
        self.incarnation = worker.incarnation
        self.heart = heart
        self.num_assigned = 0
        self._inquest = inquest
        self.admin: Any = WorkerAdminServiceStub(channel)
        self._channel = channel
        self._call: Any = None

    @property
    def num_local_prefills(self) -> int:
        """Requests whose prompts a decode worker still has to compute itself."""
        return 0

    async def run(self) -> None:
        """Keep the stream open until cancelled."""
        num_failures = 0
        try:
            while True:
                was_up = await self._converse_once()
                if num_cancels():  # grpc.aio keeps it to itself when a call's end came first
                    raise asyncio.CancelledError
                num_failures = 0 if was_up else num_failures + 1
                await asyncio.sleep(backoff_s(num_failures))
        finally:
            await self._finish()
            await self._channel.close(None)

    def give_up(self) -> None:
        """Break the stream: the worker is silent."""
        if self._call is not None:
            _log.warning("worker is silent", extra={"worker": self.worker_id})
            self._call.cancel()

    async def _converse_once(self) -> bool:
        """Hold one stream from its start to its end; tells whether the worker ever answered on it."""
        was_up = is_death = False
        reason = "closed"
        try:
            await self._converse()
        except grpc.aio.AioRpcError as e:
            reason = to_error(e).reason
            is_death = True  # until it comes back as the same start
        except InferfluxError as e:
            reason = e.reason
        except asyncio.CancelledError:  # a call that we cancel raises it in its reader, just as a cancelled task does
            if num_cancels():
                raise
            reason = "silent"
        finally:
            was_up = self.heart.is_up
            self._down(reason, is_death=is_death)
        return was_up

    def _take_pulse(self, message: types_pb2.Pulse) -> None:
        if not self.heart.is_up:
            metrics.WORKER_UP.labels(self.role.value, self.worker_id).set(1)
            _log.info("worker up", extra={"worker": self.worker_id, "incarnation": message.incarnation})
            self._inquest.came_back(message.incarnation)
        was_ready = self.heart.is_ready
        # A worker that was started anew may be here faster than through the registry.
        self.incarnation = max(self.incarnation, message.incarnation)
        is_known = message.state in STATE_FROM_PROTO
        # A state that we don't know is not ready, whatever it is.
        self.heart.beat(Pulse.from_proto(message) if is_known else Pulse(message.incarnation, State.DRAINING))
        if self.heart.has_failed:
            self._lost(is_death=False)
        elif self.heart.is_ready and not was_ready:
            self._inquest.news.ring()

    def _down(self, reason: str, *, is_death: bool) -> None:
        if self.heart.is_up:
            metrics.WORKER_UP.labels(self.role.value, self.worker_id).set(0)
            _log.warning("worker down", extra={"worker": self.worker_id, "reason": reason})
        self.heart.stop()
        self._lost(is_death=is_death)

    async def _finish(self) -> None:  # noqa: B027 - most have nothing to say
        """Complete what must still be said to the worker before the channel closes."""

    @abstractmethod
    async def _converse(self) -> None:
        """Open the stream, set `_call`, read it to its end, and clean up."""

    @abstractmethod
    def _lost(self, *, is_death: bool) -> None:
        """Take everything from the worker that runs there. `is_death`: it died, of some of that perhaps. Idempotent."""
