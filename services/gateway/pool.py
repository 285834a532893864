"""The workers this gateway is connected to, and the way to the right ones for a request.

The registry says which workers exist; their own streams say whether they live. So a worker stays as long as its stream
does, whatever the registry has forgotten, and goes when a newer start of it appears or some time after both have lost
it: one that hung, and wakes up, must find the session in which it is told to forget what it has.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, count
from types import TracebackType
from typing import Generic, Self, TypeVar

from inferflux.clock import SystemClock, until_tick
from inferflux.errors import InferfluxError, ModelNotFound, NotFound, NoWorker, Unavailable
from inferflux.policy.identity import EVERYTHING, Allowance
from inferflux.process import Tasks
from inferflux.rpc.client import open_channel
from inferflux.rpc.mtls import Identity
from inferflux.telemetry import metrics
from inferflux.types import Role, State
from inferflux.v1 import decode_service_pb2 as decode_pb
from inferflux.v1 import prefill_service_pb2 as prefill_pb
from services.gateway import routing
from services.gateway.call import Call
from services.gateway.heart import TICK_S, Heart
from services.gateway.link import Link
from services.gateway.losses import Moves
from services.gateway.matrix import Matrix
from services.gateway.news import News
from services.gateway.poison import Inquest
from services.gateway.prefill import PrefillLink
from services.gateway.session import DecodeSession
from services.gateway.views import ClusterView, Model, Worker

_log = logging.getLogger(__name__)
_JOINABLE = (State.READY, State.DRAINING)
FORGET_TICKS = 120
L = TypeVar("L", bound=Link)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who this gateway is to workers. `session_id` is new at each start of the gateway, and a prefix: see Pool."""

    gateway_id: str
    session_id: str
    identity: Identity = field(repr=False)


@dataclass(frozen=True, slots=True)
class Terms:
    """How to deal with workers. `dead_s`: one that is silent for so long is lost.

    `resume_wait_s`: how long a request that lost its worker waits for another. `max_buffered_bytes`: of one stream, for
    a slow client. `has_event_ids`: server-sent events carry ids.
    """

    dead_s: float
    resume_wait_s: float
    max_buffered_bytes: int
    local_prefill: routing.LocalPrefill
    has_event_ids: bool = True


@dataclass(slots=True)
class Peer(Generic[L]):
    """One worker and the connection to it."""

    worker: Worker
    link: L
    task: asyncio.Task[None]
    is_registered: bool = True
    num_ticks_lost: int = 0

    def candidate(self, unreadable_by: frozenset[str] = frozenset()) -> routing.Candidate:
        """Take the worker as it is now."""
        heart, link = self.link.heart, self.link
        return routing.Candidate(
            self.worker,
            heart.pulse,
            heart.is_fresh,
            link.num_assigned,
            link.num_local_prefills,
            heart.warmth,
            unreadable_by=unreadable_by,
        )


@dataclass(slots=True)
class Route:
    """The workers of one request. In its `with` block the decode worker counts as busy with it.

    `prefill` None: the decode worker computes the prompt, and `why_local` says why.
    """

    decode: DecodeSession
    prefill: PrefillLink | None
    why_local: str

    def __enter__(self) -> Self:
        self.decode.num_assigned += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.decode.num_assigned -= 1


class Pool:
    """All workers of the cluster; connections are owned by `tasks`."""

    def __init__(self, caller: Caller, tasks: Tasks, terms: Terms) -> None:
        self._caller = caller
        self._tasks = tasks
        self._terms = terms
        self._view: ClusterView | None = None
        self._dead_ticks = max(1, round(terms.dead_s / TICK_S))
        self._moves = Moves(SystemClock())
        self._inquest = Inquest(SystemClock(), News())
        self._prefills: dict[str, Peer[PrefillLink]] = {}
        self._decodes: dict[str, Peer[DecodeSession]] = {}
        self.matrix = Matrix(self._ready, self._inquest.news)
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

    def models(self, allowance: Allowance = EVERYTHING, tenant: str | None = None) -> tuple[Model, ...]:
        """Known models that may be used. Raises Unavailable as long as the registry was never heard."""
        known = self._known().models
        return tuple(model for model in known if allowance.permits(model.name) and model.is_for(tenant))

    def record(self, name: str) -> Model | None:
        """What the registry says of a model; None when it says nothing. Raises as `models`."""
        return next((model for model in self.models() if model.name == name), None)

    def _known(self) -> ClusterView:
        if self._view is None:
            raise Unavailable("the gateway has not heard the registry yet", retry_after_s=1)
        return self._view

    def resolve(self, name: str | None, allowance: Allowance = EVERYTHING, tenant: str | None = None) -> str:
        """Return the model that a call means. Raises ModelNotFound or Unavailable.

        A model that may not be used is, for whoever asks, not there.
        """
        models = self.models(allowance, tenant)
        if name is None:
            default = next((model for model in models if model.is_default), models[0] if models else None)
            if default is None and allowance.lists:
                raise ModelNotFound("there is no model to use", param="model")
            return default.name if default else ""
        is_there = any(model.name == name for model in models) or name in self._connected_models()
        if not (is_there and allowance.permits(name)):
            raise ModelNotFound(f"the model {name!r} does not exist", param="model")
        return name

    def _connected_models(self) -> set[str]:
        """Models of workers that are connected: the registry may have forgotten them."""
        return {peer.worker.model for peer in self._peers() if peer.link.heart.is_up}

    def admit(self, call: Call) -> Route:
        """Choose the workers of a new request. Raises NoWorker, KvTransportDegraded or PoisonRequest."""
        self._inquest.admit(call)
        self._moves.begin()
        return self._route(self._question(call))

    async def reroute(self, call: Call, lost: Route, error: InferfluxError) -> Route:
        """Choose other workers for a request whose decode worker ended with `error`; waits until there are some.

        Raises `error` itself if the request may not move, PoisonRequest if its workers died of it, NoWorker when none
        came in time.
        """
        if self._inquest.is_on_trial(call) or self._moves.are_spent(call.losses):
            await self._inquest.settle(call)
        self._moves.permit(call.losses, error, lost.decode.incarnation)
        call.losses.workers.add(lost.decode.worker_id)
        try:
            async with asyncio.timeout(self._terms.resume_wait_s):
                while (route := self._try_route(call)) is None:
                    await self._inquest.news.next()
        except TimeoutError:
            metrics.RESUME_REFUSED.labels("no_worker").inc()
            wait_s = self._terms.resume_wait_s
            raise NoWorker(f"no decode worker came within {wait_s:g} s for model {call.model!r}") from error
        metrics.FAILOVER.labels("decode", error.reason).inc()
        return route

    def reroute_prefill(self, call: Call, route: Route, error: InferfluxError) -> None:
        """Put another prefill worker into a route, or none: then the decode worker computes the prompt.

        Raises KvTransportDegraded when it may not, `error` when the request should go on alone: see Inquest.
        """
        if self._inquest.is_on_trial(call):
            raise error
        metrics.FAILOVER.labels("prefill", error.reason).inc()
        if route.prefill is not None:
            call.losses.workers.add(route.prefill.worker_id)
        reader = self._decodes.get(route.decode.worker_id)
        question = self._question(call)
        other = routing.another_prefill(question, self._candidates(question), reader.worker) if reader else None
        route.prefill = self._prefills[other].link if other else None
        route.why_local = "failed"
        if reader and not other and not question.is_begun:
            routing.require_local(reader.candidate(), self._terms.local_prefill)

    def _try_route(self, call: Call) -> Route | None:
        if self._inquest.gives_way(call):
            return None
        try:
            return self._route(self._question(call))
        except NoWorker:
            return None

    def _question(self, call: Call) -> routing.Question:
        losses = call.losses
        return routing.Question(
            model=call.parent or call.model,
            adapter=call.adapter,
            answerers=call.answerers,
            needs_prefill=call.needs_prefill,
            avoided=frozenset(losses.workers),
            turn=next(self._turns),
            num_body_bytes=len(call.http.body),
            is_begun=losses.lost_at > 0,
            is_suspect=bool(losses.deaths),
            is_on_trial=self._inquest.is_on_trial(call),
        )

    def _route(self, question: routing.Question) -> Route:
        plan = routing.plan(question, self._candidates(question), self._terms.local_prefill)
        prefill = self._prefills[plan.prefill].link if plan.prefill else None
        return Route(self._decodes[plan.decode].link, prefill, plan.why_local)

    def _candidates(self, question: routing.Question) -> list[routing.Candidate]:
        candidates = [peer.candidate(self.matrix.unreadable_by(peer.worker)) for peer in self._peers()]
        if not question.is_suspect:
            return candidates
        suspicious = {worker_id for worker_id, peer in self._decodes.items() if peer.link.has_suspects}
        return [replace(c, has_suspects=c.worker.worker_id in suspicious) for c in candidates]

    async def recall(self, request_id: str, tenant: str) -> decode_pb.RecallResponse:
        """Take a request back from the decode worker that got furthest with it. Raises NotFound."""
        request = decode_pb.RecallRequest(request_id=request_id, tenant=tenant)
        links = [peer.link for peer in self._decodes.values() if peer.link.heart.is_up]
        answers = await asyncio.gather(*(link.recall(request) for link in links), return_exceptions=True)
        found = [answer for answer in answers if isinstance(answer, decode_pb.RecallResponse)]
        if not found:
            raise NotFound(f"there is no stream {request_id}, or it ended more than a few seconds ago")
        return max(found, key=lambda answer: sum(len(tokens.token_ids) for tokens in answer.delivered))

    def workers(self) -> tuple[tuple[Worker, Link | None], ...]:
        """All workers that are registered or connected, and the connection to each that has one."""
        links: dict[str, Link] = {peer.worker.worker_id: peer.link for peer in self._peers()}
        registered = {worker.worker_id: worker for worker in (self._view.workers if self._view else ())}
        known = registered | {peer.worker.worker_id: peer.worker for peer in self._peers()}
        return tuple((worker, links.get(worker_id)) for worker_id, worker in sorted(known.items()))

    def prefills(self, model: str | None = None) -> list[PrefillLink]:
        """Prefill workers that are up, of one model or of all, in the order of their ids."""
        peers = sorted(self._prefills.items())
        return [p.link for _, p in peers if p.link.heart.is_up and model in (None, p.worker.model)]

    def objection(self) -> str | None:
        """Say why no request can be served now; None when some can."""
        if self._view is None:
            return "registry not heard yet"
        is_served = any(peer.link.heart.is_ready for peer in self._decodes.values())
        return None if is_served else "no decode worker is ready"

    async def met(self, timeout_s: float) -> None:
        """Wait until a worker that answers is connected, unless the registry knows of none that is ready."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._expects_decode() and self.objection() is not None:
                    await self._inquest.news.next()

    def _expects_decode(self) -> bool:
        workers = self._view.workers if self._view else ()
        return any(worker.role is not Role.PREFILL and worker.state is State.READY for worker in workers)

    async def watch_hearts(self) -> None:
        """Give up streams that went silent; run until cancelled."""
        while True:
            await asyncio.sleep(until_tick(TICK_S))
            for peer in self._peers():
                peer.link.heart.tick()
                if peer.link.heart.is_dead:
                    peer.link.give_up()
                is_lost = not (peer.is_registered or peer.link.heart.is_up)
                peer.num_ticks_lost = peer.num_ticks_lost + 1 if is_lost else 0
            self._forget_lost()

    def _ready(self) -> Iterator[tuple[Worker, Link]]:
        return ((peer.worker, peer.link) for peer in self._peers() if peer.link.heart.is_ready)

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
            prefill = PrefillLink(worker, channel, heart, self._inquest, watch)
            self._prefills[worker.worker_id] = Peer(worker, prefill, self._spawn(prefill))
        else:
            hello = decode_pb.Hello(session_id=session_id, gateway_id=caller.gateway_id)
            decode = DecodeSession(
                worker,
                channel,
                heart,
                self._inquest,
                hello,
                max_buffered_bytes=self._terms.max_buffered_bytes,
                has_event_ids=self._terms.has_event_ids,
            )
            self._decodes[worker.worker_id] = Peer(worker, decode, self._spawn(decode))

    def _spawn(self, link: Link) -> asyncio.Task[None]:
        return self._tasks.spawn(link.run(), f"link-{link.worker_id}", may_return=True)

    def _forget_lost(self) -> None:
        for peer in [peer for peer in self._peers() if peer.num_ticks_lost > FORGET_TICKS]:
            self._drop(peer)

    def _drop(self, peer: Peer[PrefillLink] | Peer[DecodeSession]) -> None:
        _log.info("worker dropped", extra={"worker": peer.worker.worker_id, "incarnation": peer.link.incarnation})
        self._prefills.pop(peer.worker.worker_id, None)
        self._decodes.pop(peer.worker.worker_id, None)
        peer.task.cancel()
