"""A worker process from start to end; the roles differ in a `Part`.

1. prepare: create the arena; no loop, no threads yet
2. verify: the model's files; one that is refused keeps the worker up, failed and out of its pool
3. start: the engine (it may fork), then the gRPC server: whoever has threads must not fork
4. prove: the engine's numerics, registered as starting; a mismatch keeps the worker up, failed and out of its pool
5. serve: until a drain begins
6. drain: announced to the registry; running requests finish, tickets run out, within a budget
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import grpc

from inferflux.clock import SystemClock, until_tick
from inferflux.config import load
from inferflux.engine import create
from inferflux.engine.base import EngineInfo
from inferflux.errors import ConfigError, ModelRefused, NumericsMismatch, WorkerLost
from inferflux.kv import nixl
from inferflux.kv.arena import Arena
from inferflux.kv.nixl import NixlServer
from inferflux.kv.prefixes import Place, PrefixStore
from inferflux.kv.shm import ArenaServer, host_id
from inferflux.lifecycle import Lifecycle
from inferflux.process import Tasks, fail, run
from inferflux.rpc.client import open_channel
from inferflux.rpc.mtls import Identity
from inferflux.rpc.server import RpcServer
from inferflux.tickets import Claimant, Issuer, TicketBook
from inferflux.types import Role, Transport
from inferflux.v1.worker_admin_service_pb2_grpc import add_WorkerAdminServiceServicer_to_server
from inferflux.worker import admin
from inferflux.worker.adapters import Adapters
from inferflux.worker.claims import Claims
from inferflux.worker.drain import Drain
from inferflux.worker.leases import SessionLeases
from inferflux.worker.ledger import Ledger, measure
from inferflux.worker.meter import Meter
from inferflux.worker.model import LoadableModel, open_model
from inferflux.worker.paths import Paths
from inferflux.worker.prefixes import PrefixTally
from inferflux.worker.progress import Progress
from inferflux.worker.registration import MakeRequest, Registration, refused_request, worker_request
from inferflux.worker.settings import WorkerSettings
from inferflux.worker.work import Work
from inferflux.worker.worker import Worker

WATCH_S = 0.5
STOP_GRACE_S = 1.0
# What hangs with an engine may keep the process from ending.
EXIT_S = 15.0
_log = logging.getLogger(__name__)


class Part(ABC):
    """What a role adds to a worker."""

    callers: Mapping[str, frozenset[str]]
    ledger: Ledger | None = None
    """Prefill workers have one."""

    @property
    @abstractmethod
    def leases(self) -> SessionLeases:
        """The gateways that are connected."""

    @abstractmethod
    def add_to(self, server: grpc.aio.Server) -> None:
        """Add the role's servicers."""

    @abstractmethod
    async def run(self) -> None:
        """Do the role's background work for ever."""

    @abstractmethod
    async def wait_over(self) -> None:
        """Wait until nobody needs this worker, once no request runs any more."""

    @abstractmethod
    async def close(self) -> None:
        """End what still runs and all streams; the last answers are still delivered."""


MakePart = Callable[[Worker, Tasks], Part]


def main(role: Role, make_part: MakePart) -> int:
    """Run a worker configured by the environment; returns the exit code."""
    try:
        settings = load(WorkerSettings, os.environ)
    except ConfigError as e:
        return fail(role, e)
    process = WorkerProcess(role, settings, make_part)
    return run(role, settings.instance_id, settings, process.serve, prepare=process.prepare)


class WorkerProcess:
    """The life of one worker process."""

    def __init__(self, role: Role, settings: WorkerSettings, make_part: MakePart) -> None:
        self._role = role
        self._settings = settings
        self._make_part = make_part
        self._arena: Arena | None = None

    def prepare(self) -> None:
        """Do what must precede the event loop."""
        if self._role is Role.PREFILL:
            self._arena = Arena.create(self._settings.kv_arena_bytes)

    async def serve(self, lifecycle: Lifecycle) -> None:
        """Serve until drained."""
        identity = Identity.load(self._settings.pki_dir, self._role)
        try:
            async with open_model(self._settings, self._role) as model:
                await self._serve_model(lifecycle, identity, model)
        except ModelRefused as e:
            lifecycle.set_failed(e.message)
            await self._stay_refused(lifecycle, identity)

    async def _serve_model(self, lifecycle: Lifecycle, identity: Identity, model: LoadableModel) -> None:
        ticket_key = _read_secret(self._settings, "ticket.key")
        async with self._worker(lifecycle, identity, ticket_key, model) as worker, Tasks() as tasks:
            part = self._make_part(worker, tasks)
            server = RpcServer(identity, self._settings.bind, {**admin.CALLERS, **part.callers})
            add_WorkerAdminServiceServicer_to_server(admin.AdminServicer(worker, part.ledger, part.leases), server.grpc)
            part.add_to(server.grpc)
            address = await server.start()
            if worker.book is not None:
                worker.book.address = address
            try:
                tasks.spawn(part.run(), "part")
                tasks.spawn(_guard(worker), "engine-watch")
                request = partial(worker_request, worker, address)
                async with _registered(self._settings, lifecycle, request, identity, tasks) as announce:
                    if worker.adapters is not None:
                        worker.adapters.on_change = announce
                    await _prove(worker)
                    announce()
                    await lifecycle.draining.wait()
                    announce()
                    await worker.drain.wait(worker.work.wait_idle, part.wait_over)
                    await part.close()
            finally:
                await server.stop(STOP_GRACE_S)

    async def _stay_refused(self, lifecycle: Lifecycle, identity: Identity) -> None:
        """Stay up without an engine, registered as failed, so that the reason can be read; until drained."""
        async with Tasks() as tasks:
            request = partial(refused_request, self._role, self._settings, lifecycle)
            async with _registered(self._settings, lifecycle, request, identity, tasks):
                await lifecycle.draining.wait()

    @asynccontextmanager
    async def _worker(
        self, lifecycle: Lifecycle, identity: Identity, ticket_key: bytes, model: LoadableModel
    ) -> AsyncIterator[Worker]:
        """Start the engine and what its blocks need; close everything at the end."""
        tally = PrefixTally()
        prefixes = self._prefix_store(lifecycle, tally)
        engine = create(self._settings.engine, self._settings.engine_options(self._role, model), self._arena, prefixes)
        async with AsyncExitStack() as stack:
            if self._arena is not None:
                stack.callback(self._arena.close)
            stack.push_async_callback(engine.close)
            info = await engine.start()
            await model.check_unchanged()
            info = replace(info, capabilities=model.capable_of(info.capabilities))
            book, nixl_server = await self._serve_arena(lifecycle, info, ticket_key, prefixes, stack)
            _log_transports(self._settings.transports)
            adapters = Adapters(engine, self._settings, self._role)
            stack.callback(adapters.close)
            yield Worker(
                adapters=adapters,
                role=self._role,
                settings=self._settings,
                lifecycle=lifecycle,
                engine=engine,
                info=info,
                work=Work(lifecycle),
                drain=Drain(lifecycle, self._settings.drain_budget_s),
                host_id=host_id(),
                ticket_key=ticket_key,
                model=model,
                progress=Progress(SystemClock(), self._settings.wedge_s),
                meter=Meter(SystemClock()),
                arena=self._arena,
                book=book,
                nixl=nixl_server,
                paths=self._paths(identity, stack),
                claims=self._claims(lifecycle, identity, stack),
                prefixes=prefixes,
                tally=tally,
            )

    def _prefix_store(self, lifecycle: Lifecycle, tally: PrefixTally) -> PrefixStore | None:
        if self._arena is None:
            return None
        settings = self._settings
        place = Place(str(settings.arena_socket), lifecycle.incarnation) if settings.kv_prefix_cache else None
        return PrefixStore(self._arena, place, pinned_share=settings.kv_pinned_share, on_evict=tally.evicted)

    async def _serve_arena(
        self,
        lifecycle: Lifecycle,
        info: EngineInfo,
        ticket_key: bytes,
        prefixes: PrefixStore | None,
        stack: AsyncExitStack,
    ) -> tuple[TicketBook | None, NixlServer | None]:
        if self._arena is None:
            return None, None
        self._arena.seal()
        path: Path | str = ""
        if Transport.SHM in self._settings.transports:
            path = self._settings.arena_socket
            server = ArenaServer(self._arena, path, lifecycle.incarnation)
            stack.push_async_callback(server.close)
            await server.start()
        issuer = Issuer(
            worker_id=lifecycle.instance_id,
            incarnation=lifecycle.incarnation,
            fingerprint=info.fingerprint,
            socket_path=str(path),
            host_id=host_id(),
            key=ticket_key,
        )
        book = TicketBook(self._arena, SystemClock(), issuer, measure, prefixes)
        if Transport.NIXL not in self._settings.transports:
            return book, None
        nixl_server = NixlServer(self._arena, is_busy=lambda: book.counts().live > 0)
        stack.callback(nixl_server.close)
        return book, nixl_server

    def _claims(self, lifecycle: Lifecycle, identity: Identity, stack: AsyncExitStack) -> Claims | None:
        if self._role is not Role.DECODE:
            return None
        claims = Claims(identity, Claimant(lifecycle.instance_id, lifecycle.incarnation))
        stack.push_async_callback(claims.close)
        return claims

    def _paths(self, identity: Identity, stack: AsyncExitStack) -> Paths | None:
        if self._role is not Role.DECODE:
            return None
        paths = Paths(identity, host_id(), self._settings.transports)
        stack.callback(paths.close)
        return paths


@asynccontextmanager
async def _registered(
    settings: WorkerSettings, lifecycle: Lifecycle, request: MakeRequest, identity: Identity, tasks: Tasks
) -> AsyncIterator[Callable[[], None]]:
    """Keep the worker registered inside the block; gives the function that announces a change of state."""
    if not settings.registry_address:
        yield lambda: None
        return
    async with open_channel(settings.registry_address, identity, "registry") as channel:
        registration = Registration(request, lifecycle, channel)
        task = tasks.spawn(registration.run(), "registration")
        try:
            yield registration.announce
        finally:
            task.cancel()
            await asyncio.wait([task])
            await registration.leave()


async def _prove(worker: Worker) -> None:
    try:
        await worker.engine.check_numerics()
    except NumericsMismatch as e:
        worker.lifecycle.set_failed(e.message)
    else:
        worker.lifecycle.set_ready()


async def watch(worker: Worker) -> None:
    """Fail readiness while the engine is wedged. Raises WorkerLost when it will not come back."""
    progress = worker.progress

    def is_alive() -> bool:
        return worker.engine.load().is_alive

    worker.lifecycle.add_readiness("engine", lambda: progress.objection if is_alive() else "the engine is dead")
    while True:
        load = worker.engine.load()
        if not load.is_alive:
            raise WorkerLost("the engine is dead")
        progress.observe(load)
        if progress.is_hopeless:
            raise WorkerLost(f"the engine is wedged: {progress.objection}")
        await asyncio.sleep(until_tick(WATCH_S))


async def _guard(worker: Worker) -> None:
    """End the process when its engine is beyond help: whoever supervises it starts another, gateways go elsewhere."""
    try:
        await watch(worker)
    except WorkerLost as e:
        _log.error("engine lost, the worker exits", extra={"reason": e.message})
        faulthandler.dump_traceback_later(EXIT_S, exit=True)
        raise


def _log_transports(transports: Sequence[Transport]) -> None:
    if not nixl.is_installed():
        _log.info("nixl is not installed: no KV to or from other hosts")
    _log.info("kv transports", extra={"transports": transports})


def _read_secret(settings: WorkerSettings, name: str) -> bytes:
    try:
        return (settings.secrets_dir / name).read_bytes()
    except OSError as e:
        raise ConfigError(f"no usable secret {name} in {settings.secrets_dir}: {e}") from e
