"""The workers this gateway is connected to, and the way to the right ones for a request.

The registry says which workers exist; their own streams say whether they live. So a worker stays as long as its stream
does, whatever the registry has forgotten, and goes when a newer start of it appears or when both have lost it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, count
from types import TracebackType
from typing import Generic, Self, TypeVar

from inferflux.clock import until_tick
from inferflux.errors import ModelNotFound, Unavailable
from inferflux.process import Tasks
from inferflux.rpc.client import open_channel
from inferflux.rpc.mtls import Identity
from inferflux.types import Role, State
from inferflux.v1 import decode_service_pb2 as decode_pb
from inferflux.v1 import prefill_service_pb2 as prefill_pb
from services.gateway import routing
from services.gateway.heart import TICK_S, Heart
from services.gateway.link import Link
from services.gateway.prefill import PrefillLink
from services.gateway.session import DecodeSession
from services.gateway.views import ClusterView, Model, Worker

_log = logging.getLogger(__name__)
_JOINABLE = (State.READY, State.DRAINING)
L = TypeVar("L", bound=Link)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who this gateway is to workers. `session_id` is new at each start of the gateway, and a prefix: see Pool."""

    gateway_id: str
    session_id: str
    identity: Identity = field(repr=False)


@dataclass(slots=True)
class Peer(Generic[L]):
    """One worker and the connection to it."""

    worker: Worker
    link: L
    task: asyncio.Task[None]
    is_registered: bool = True

    def candidate(self) -> routing.Candidate:
        """Take the worker as it is now."""
        heart = self.link.heart
        return routing.Candidate(self.worker, heart.pulse, heart.is_fresh, self.link.num_assigned)


@dataclass(frozen=True, slots=True)
class Route:
    """The workers of one request. In its `with` block the decode worker counts as busy with it."""

    plan: routing.Plan
    decode: DecodeSession
    prefill: PrefillLink | None

    def __enter__(self) -> Self:
        self.decode.num_assigned += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.decode.num_assigned -= 1


class Pool:
    """All workers of the cluster; connections are owned by `tasks`.

    `dead_s`: a worker silent for so long is lost. `max_buffered_bytes`: of one stream, for a slow client.
    """

    def __init__(self, caller: Caller, tasks: Tasks, *, dead_s: float, max_buffered_bytes: int) -> None:
        self._caller = caller
        self._tasks = tasks
        self._view: ClusterView | None = None
        self._dead_ticks = max(1, round(dead_s / TICK_S))
        self._max_buffered_bytes = max_buffered_bytes
        self._prefills: dict[str, Peer[PrefillLink]] = {}
        self._decodes: dict[str, Peer[DecodeSession]] = {}
        self._turns = count()
        self._joins = count()

    def reconcile(self, view: ClusterView) -> None:
        """Take the registry's newest view: connect to the workers that are there, let go of those that are not."""
        self._view = view
        for worker in view.workers:
            self._meet(worker)
        registered = {worker.worker_id for worker in view.workers}
        for peer in self._peers():
            peer.is_registered = peer.worker.worker_id in registered
        self._forget_lost()

    def models(self) -> tuple[Model, ...]:
        """Known models. Raises Unavailable as long as the registry was never heard."""
        if self._view is None:
            raise Unavailable("the gateway has not heard the registry yet", retry_after_s=1)
        return self._view.models

    def resolve(self, name: str | None) -> str:
        """Return the model that a call means. Raises ModelNotFound or Unavailable."""
        models = self.models()
        if name is None:
            default = next((model for model in models if model.is_default), models[0] if models else None)
            return default.name if default else ""
        if all(model.name != name for model in models) and all(peer.worker.model != name for peer in self._peers()):
            raise ModelNotFound(f"the model {name!r} does not exist", param="model")
        return name

    def route(self, model: str, *, needs_prefill: bool, excluded: frozenset[str] = frozenset()) -> Route:
        """Choose workers. Raises NoWorker."""
        question = routing.Question(model, needs_prefill, excluded, next(self._turns))
        plan = routing.plan(question, [peer.candidate() for peer in self._peers()])
        prefill = self._prefills[plan.prefill].link if plan.prefill else None
        return Route(plan, self._decodes[plan.decode].link, prefill)

    def objection(self) -> str | None:
        """Say why no request can be served now; None when some can."""
        if self._view is None:
            return "registry not heard yet"
        is_served = any(peer.link.heart.is_ready for peer in self._decodes.values())
        return None if is_served else "no decode worker is ready"

    async def watch_hearts(self) -> None:
        """Give up streams that went silent; run until cancelled."""
        while True:
            await asyncio.sleep(until_tick(TICK_S))
            for peer in self._peers():
                peer.link.heart.tick()
                if peer.link.heart.is_dead:
                    peer.link.give_up()
            self._forget_lost()

    def _peers(self) -> Iterator[Peer[PrefillLink] | Peer[DecodeSession]]:
        return chain(self._prefills.values(), self._decodes.values())

    def _meet(self, worker: Worker) -> None:
        known = self._prefills.get(worker.worker_id) or self._decodes.get(worker.worker_id)
        if known is not None and known.link.incarnation >= worker.incarnation:
            known.worker = worker
        elif worker.state in _JOINABLE:
            if known is not None:
                self._drop(known)
            self._join(worker)

    def _join(self, worker: Worker) -> None:
        caller, heart = self._caller, Heart(self._dead_ticks)
        channel = open_channel(worker.address, caller.identity, worker.role.value)
        # A link knows nothing of the requests of a link before it, so it must not continue its session.
        session_id = f"{caller.session_id}.{next(self._joins)}"
        if worker.role is Role.PREFILL:
            watch = prefill_pb.WatchRequest(session_id=session_id, gateway_id=caller.gateway_id)
            prefill = PrefillLink(worker, channel, heart, watch)
            self._prefills[worker.worker_id] = Peer(worker, prefill, self._spawn(prefill))
        else:
            hello = decode_pb.Hello(session_id=session_id, gateway_id=caller.gateway_id)
            decode = DecodeSession(worker, channel, heart, hello, self._max_buffered_bytes)
            self._decodes[worker.worker_id] = Peer(worker, decode, self._spawn(decode))

    def _spawn(self, link: Link) -> asyncio.Task[None]:
        return self._tasks.spawn(link.run(), f"link-{link.worker_id}", may_return=True)

    def _forget_lost(self) -> None:
        for peer in [peer for peer in self._peers() if not (peer.is_registered or peer.link.heart.is_up)]:
            self._drop(peer)

    def _drop(self, peer: Peer[PrefillLink] | Peer[DecodeSession]) -> None:
        _log.info("worker dropped", extra={"worker": peer.worker.worker_id, "incarnation": peer.link.incarnation})
        self._prefills.pop(peer.worker.worker_id, None)
        self._decodes.pop(peer.worker.worker_id, None)
        peer.task.cancel()
