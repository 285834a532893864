"""One simulated cluster: real gateways and workers, each a set of tasks, on one loop and one network."""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inferflux.engine.base import KvSource
from inferflux.errors import KvStale, KvUnreachable
from inferflux.kv.arena import Arena, ArenaReader
from inferflux.kv.prefixes import PrefixStore
from inferflux.lifecycle import Lifecycle
from inferflux.process import Tasks
from inferflux.tickets import Issuer, TicketBook
from inferflux.types import HttpCall, RequestContext, Role, State
from inferflux.v1 import prefill_service_pb2 as prefill_pb
from inferflux.v1.prefill_service_pb2_grpc import PrefillServiceStub
from inferflux.worker.drain import Drain
from inferflux.worker.leases import SessionLeases
from inferflux.worker.main import Part
from inferflux.worker.meter import Meter
from inferflux.worker.prefixes import PrefixTally
from inferflux.worker.progress import Progress
from inferflux.worker.settings import WorkerSettings
from inferflux.worker.work import Work
from inferflux.worker.worker import Worker
from services.decode.__main__ import DecodePart
from services.gateway import pool as pools
from services.gateway.auth import Authenticator, Key, KeyRing, Principal, hash_secret
from services.gateway.endpoints import Scope
from services.gateway.envelope import BodyLimits
from services.gateway.inference import Inference
from services.gateway.policy import Policies
from services.gateway.pool import Caller, Pool
from services.gateway.reservations import Reservations
from services.gateway.settings import Settings
from services.gateway.views import ClusterView, Model
from services.gateway.views import Worker as View
from services.prefill.__main__ import PrefillPart
from tests.simulation.engine import FINGERPRINT, GhostEngine, answer
from tests.simulation.loop import LoopClock
from tests.simulation.network import Channel, Network, Server

TICKET_KEY, PEPPER, SECRET = b"t" * 32, b"p" * 32, b"sk-simulation"
SALT, HOST = "salt", "host"
ARENA_BYTES = 1 << 18
TIMEOUT_S = 60.0
RESTART_S = (0.3, 1.5)
LEFT_S = 1.0
"""A request may go on for so long without its client."""
LONGEST_S = 15.0
"""Steps, one detection of a lost worker and a second try take less, however long a fault lasts."""


class SimWorker:
    """One worker over all its starts."""

    def __init__(self, world: World, role: Role, number: int, step_s: float) -> None:
        self.worker_id = f"{role}-{number}"
        self.role = role
        self.worker: Worker | None = None
        self._world = world
        self._step_s = step_s
        self._num_starts = 0
        self._life: asyncio.Task[None] | None = None
        self._server: Server | None = None
        self._arena: Arena | None = None
        self._readers: dict[str, ArenaReader] = {}

    def start(self) -> None:
        """Start the process."""
        self._num_starts += 1
        self._readers = {}
        self._life = asyncio.create_task(self._live(), name=f"life-{self.worker_id}")

    async def crash(self) -> None:
        """Die at once, and start again after a while."""
        self._die()
        await asyncio.sleep(self._world.rng.uniform(*RESTART_S))
        self.start()

    async def drain(self) -> None:
        """Drain as SIGTERM does, and start again."""
        worker = self.worker
        if worker is None:
            return
        worker.lifecycle.begin_drain()
        self._world.announce()
        part: Part = self.part
        await worker.drain.wait(worker.work.wait_idle, part.wait_over)
        await part.close()
        await asyncio.sleep(0.1)  # the server's grace: last answers are delivered
        self._die()
        await asyncio.sleep(self._world.rng.uniform(*RESTART_S))
        self.start()

    def stop(self) -> None:
        """End for good."""
        self._die()

    def view(self) -> View | None:
        """What the registry says of it."""
        if self.worker is None:
            return None
        lifecycle = self.worker.lifecycle
        return View(
            self.worker_id,
            lifecycle.incarnation,
            self.role,
            "m",
            self.worker_id,
            lifecycle.state,
            FINGERPRINT,
            HOST,
            64,
        )

    def _die(self) -> None:
        if self._server is not None:
            self._server.kill()
        if self._life is not None:
            self._life.cancel()
        self.worker = None
        self._server = None

    async def _live(self) -> None:
        world = self._world
        lifecycle = Lifecycle(self.role, self.worker_id)
        lifecycle.incarnation = f"{self._num_starts:012x}"
        self._arena = arena = Arena.create(ARENA_BYTES) if self.role is Role.PREFILL else None
        engine = GhostEngine(arena, self._open, lambda: world.network.is_frozen(self.worker_id), self._step_s)
        info = await engine.start()
        book = prefixes = None
        if arena is not None:
            arena.seal()
            issuer = Issuer(self.worker_id, lifecycle.incarnation, FINGERPRINT, self.worker_id, HOST, TICKET_KEY)
            prefixes = PrefixStore(arena)
            book = TicketBook(arena, LoopClock(), issuer, prefixes=prefixes)
            world.arenas[self.worker_id] = lifecycle.incarnation, arena
        settings = WorkerSettings(
            instance_id=self.worker_id, model="m", engine="sim", run_dir=world.folder, kv_prefix_cache=False
        )
        worker = Worker(
            role=self.role,
            settings=settings,
            lifecycle=lifecycle,
            engine=engine,
            info=info,
            work=Work(lifecycle),
            drain=Drain(lifecycle, 10.0),
            host_id=HOST,
            ticket_key=TICKET_KEY,
            arena=arena,
            book=book,
            prefixes=prefixes,
            tally=PrefixTally() if prefixes is not None else None,
            progress=Progress(LoopClock(), 2.0),
            meter=Meter(LoopClock()),
        )
        try:
            async with Tasks() as tasks:
                self.part = part = (PrefillPart if arena is not None else DecodePart)(worker, tasks)
                tasks.spawn(part.run(), "part")
                self._server = Server(world.network, self.worker_id, self.worker_id, handlers(part))
                self.worker = worker
                lifecycle.set_ready()
                world.announce()
                try:
                    await asyncio.Event().wait()
                finally:
                    leases_of(part)._on_lost = lambda _: None  # the timers of the dead ring no more
        finally:
            if arena is not None:
                arena.close()

    def _open(self, source: KvSource) -> ArenaReader:
        """Map another worker's arena, as inferflux.kv.shm.fetch does."""
        key = f"{source.socket_path}/{source.incarnation}"
        if key not in self._readers:
            incarnation, arena = self._world.arenas.get(source.socket_path, ("", None))
            if arena is None or not arena.is_formatted:
                raise KvUnreachable("the worker is gone")
            if incarnation != source.incarnation:
                raise KvStale("another start of the worker")
            self._readers[key] = ArenaReader.open(arena.fd)
        return self._readers[key]


def leases_of(part: Any) -> SessionLeases:
    """The leases of a worker's sessions."""
    leases: SessionLeases = part._sessions.leases if isinstance(part, DecodePart) else part._leases
    return leases


def handlers(part: Part) -> dict[str, Any]:
    """The RPCs of a worker."""
    servicer = part._servicer  # type: ignore[attr-defined]
    if isinstance(part, DecodePart):
        return {"/inferflux.v1.DecodeService/Session": servicer.Session}
    names = ("Prefill", "Release", "Warm", "Watch")
    return {f"/inferflux.v1.PrefillService/{name}": getattr(servicer, name) for name in names}


class SimGateway:
    """One gateway over all its starts. Each start is another client of the network."""

    def __init__(self, world: World, number: int) -> None:
        self._world = world
        self._id = f"gateway-{number}"
        self._num_starts = 0
        self._life: asyncio.Task[None] | None = None
        self.name = ""
        self.pool: Pool | None = None
        self.app: Inference | None = None

    def start(self) -> None:
        """Start the process."""
        self._num_starts += 1
        self.name = f"{self._id}.{self._num_starts}"
        self._life = asyncio.create_task(self._live(), name=f"life-{self.name}")

    def stop(self) -> None:
        """End for good."""
        if self._life is not None:
            self._life.cancel()

    async def _live(self) -> None:
        principal = Principal("key", "acme", frozenset({Scope.GENERATE}), 0, SALT)
        digest = hash_secret(PEPPER, SECRET)
        ring = KeyRing(1, {digest: Key(digest, principal)})
        caller = Caller(self._id, self.name, self.name)  # type: ignore[arg-type] - the network knows us by our name
        async with Tasks() as tasks:
            self.pool = make_pool(caller, tasks)
            self.app = Inference(
                auth=Authenticator(PEPPER, lambda: ring),
                pool=self.pool,
                policies=lambda: Policies(1, ring),
                reservations=Reservations(shares=None),
                limits=BodyLimits(),
                timeout_s=TIMEOUT_S,
                access_log=None,
            )
            tasks.spawn(self.pool.watch_hearts(), "hearts")
            self._world.announce()
            await asyncio.Event().wait()


def make_pool(caller: Caller, tasks: Tasks) -> Pool:
    """Make the real pool of a gateway, as its process does."""
    settings = Settings(policy_address="-", registry_address="-", sse_event_ids=False)
    return Pool(caller, tasks, settings.terms)


@dataclass(slots=True)
class Request:
    """One request and what became of it."""

    number: int
    prompt: list[int]
    seed: int
    num_tokens: int
    is_streamed: bool
    leave_after_s: float | None = None
    status: int = 0
    data: bytearray = field(default_factory=bytearray)
    is_over: bool = False
    has_left: bool = False
    began_at: float = 0.0
    left_at: float = 0.0
    ended_at: float = 0.0

    def complaint(self) -> str | None:
        """Say what is wrong with the outcome."""
        if not self.ended_at or not (self.is_over or self.has_left):
            return "never ended"
        if self.has_left and self.ended_at - self.left_at > LEFT_S:
            return f"went on for {self.ended_at - self.left_at:.1f} s after its client had left"
        if self.ended_at - self.began_at > LONGEST_S:
            return f"took {self.ended_at - self.began_at:.1f} s"
        wanted = answer(self.prompt, SALT, self.seed, self.num_tokens)
        text = self.data.decode()
        if self.has_left:
            whole = "".join(f"data: {i}\n\n" for i in wanted) + "data: [DONE]\n\n"
            return None if not self.is_streamed or whole.startswith(text) else f"wrong before it left: {text[-200:]}"
        if self.is_streamed:
            whole = "".join(f"data: {i}\n\n" for i in wanted) + "data: [DONE]\n\n"
            is_right = self.status == 200 and text == whole
        else:
            is_right = self.status == 200 and json.loads(text).get("tokens") == wanted
        return None if is_right else f"status {self.status}, {len(text)} bytes ending in {text[-160:]!r}"


class World:
    """Everything, and how it is broken."""

    def __init__(self, rng: random.Random, folder: Path, *, num_prefill: int = 2, num_decode: int = 2) -> None:
        self.rng = rng
        self.folder = folder
        self.network = Network(rng)
        self.arenas: dict[str, tuple[str, Arena]] = {}
        self.is_registry_up = True
        self._revision = 0
        step_s = rng.choice((0.001, 0.005, 0.02))
        self.prefills = [SimWorker(self, Role.PREFILL, i, step_s) for i in range(num_prefill)]
        self.decodes = [SimWorker(self, Role.DECODE, i, step_s) for i in range(num_decode)]
        self.gateway = SimGateway(self, 0)
        self.requests: list[Request] = []

    @property
    def workers(self) -> list[SimWorker]:
        return [*self.prefills, *self.decodes]

    @classmethod
    @contextmanager
    def made(cls, seed: int) -> Iterator[World]:
        """Make a world of a seed; its processes run on the current loop."""
        connect = pools.open_channel
        random.seed(seed)
        with tempfile.TemporaryDirectory(prefix="ifx-", dir="/tmp") as folder:
            world = cls(random.Random(seed), Path(folder))
            # The seam: everything above it is the product, everything below is simulated.
            vars(pools)["SystemClock"] = LoopClock
            pools.open_channel = lambda address, identity, _: Channel(world.network, identity, address)  # type: ignore[assignment,misc]
            try:
                yield world
            finally:
                pools.open_channel = connect

    async def start(self) -> None:
        """Start all processes and wait until the gateway knows them."""
        self.gateway.start()
        for worker in self.workers:
            worker.start()
        await asyncio.sleep(1.0)

    async def stop(self) -> None:
        """End everything; nothing may be left on the loop."""
        self.network.heal()
        self.gateway.stop()
        for worker in self.workers:
            worker.stop()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(1.0)

    def announce(self) -> None:
        """Tell the gateway of all workers, as the registry does."""
        if not self.is_registry_up or self.gateway.pool is None:
            return
        self._revision += 1
        views = tuple(view for worker in self.workers if (view := worker.view()) is not None)
        model = Model("m", "ab", "float32", 1 << 16, (), 0, is_default=True)
        self.gateway.pool.reconcile(ClusterView(self._revision, views, (model,)))

    async def ask(self, request: Request) -> None:
        """Send one request through the gateway's ASGI application."""
        loop = asyncio.get_running_loop()
        self.requests.append(request)
        fields = {
            "model": "m",
            "prompt": request.prompt,
            "seed": request.seed,
            "max_tokens": request.num_tokens,
            "stream": request.is_streamed,
        }
        gone = asyncio.Event()
        parts = [{"type": "http.request", "body": json.dumps(fields).encode()}]

        async def receive() -> Any:
            if parts:
                return parts.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if request.has_left:
                return
            if message["type"] == "http.response.start":
                request.status = message["status"]
            else:
                request.data += message["body"]
                request.is_over = not message.get("more_body", False)

        def leave() -> None:
            request.has_left, request.left_at = not request.is_over, loop.time()
            gone.set()

        request.began_at = loop.time()
        if request.leave_after_s is not None:
            loop.call_later(request.leave_after_s, leave)
        scope = {
            "type": "http",
            "path": "/v1/completions",
            "method": "POST",
            "query_string": b"",
            "headers": [(b"authorization", b"Bearer " + SECRET), (b"content-type", b"application/json")],
        }
        assert self.gateway.app is not None
        await self.gateway.app(scope, receive, send)
        request.ended_at = loop.time()

    def forget_workers(self) -> None:
        """Let the registry know of no worker, as after the loss of its store."""
        assert self.gateway.pool is not None
        self._revision += 1
        self.gateway.pool.reconcile(ClusterView(self._revision, (), self.gateway.pool.models()))

    async def hold_ticket_and_vanish(self, worker: SimWorker) -> None:
        """Be a gateway that takes a ticket and is killed: nobody comes for it, and no new work either."""
        stub: Any = PrefillServiceStub(Channel(self.network, "vanishing", worker.worker_id))  # type: ignore[no-untyped-call]
        watch = stub.Watch(prefill_pb.WatchRequest(session_id="vanishing", gateway_id="vanishing"))
        body = json.dumps({"prompt": [1, 2, 3, 4, 5], "seed": 1}).encode()
        call = HttpCall("POST", "/v1/completions", body).to_proto()
        context = RequestContext("req_vanishing").to_proto()
        request = prefill_pb.PrefillRequest(context=context, call=call, session_id="vanishing")
        response = await stub.Prefill(request)
        assert response.prefilled.prompts[0].HasField("ticket")
        watch.cancel()

    def unleased(self) -> list[str]:
        """Name the workers that do not know the session in which the gateway takes their tickets."""
        assert self.gateway.pool is not None
        complaints = []
        for worker in self.workers:
            peer = next((p for p in self.gateway.pool._peers() if p.worker.worker_id == worker.worker_id), None)
            if worker.worker is None or peer is None or not peer.link.heart.is_up:
                complaints.append(f"the gateway has no stream to {worker.worker_id}")
            elif not leases_of(worker.part)._num_open[peer.link._hello.session_id]:  # type: ignore[attr-defined]
                complaints.append(f"{worker.worker_id} has no lease of the gateway's session")
        return complaints

    def held(self) -> list[str]:
        """What idle workers still hold."""
        complaints = []
        for worker in self.workers:
            if worker.worker is None:
                complaints.append(f"{worker.worker_id} is not there")
                continue
            pulse = worker.worker.pulse()
            if pulse.state is not State.READY:
                complaints.append(f"{worker.worker_id} is {pulse.state}")
            held = {
                "blocks": pulse.num_blocks - pulse.num_free_blocks,
                "slots": pulse.num_slots - pulse.num_free_slots,
                "tickets": pulse.num_live_tickets,
                "requests": worker.worker.work.num_running,
            }
            complaints += [f"{worker.worker_id} holds {n} {what}" for what, n in held.items() if n]
            if worker.worker.book is not None:
                counts = worker.worker.book.counts()
                if counts.issued != counts.released + counts.expired + counts.revoked + counts.live:
                    complaints.append(f"{worker.worker_id}: tickets are not conserved: {counts}")
        return complaints


def make_requests(rng: random.Random, num: int) -> Sequence[Request]:
    """Draw requests."""
    return [
        Request(
            number=i,
            prompt=[rng.randrange(1000) for _ in range(rng.randrange(1, 40))],
            seed=rng.randrange(100),
            num_tokens=rng.choice((1, 2, 5, 40, 200)),
            is_streamed=rng.random() < 0.7,
            leave_after_s=rng.uniform(0.0, 2.0) if rng.random() < 0.15 else None,
        )
        for i in range(num)
    ]
