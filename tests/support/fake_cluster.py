"""Everything a gateway talks to, in this process and under the test's control, over real gRPC with real certificates.

Not mocks: each fake is a small service that speaks the whole protocol, so the gateway can't tell. What a decode worker
does with a request is a script, an async function that gets the request and sends deltas.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import itertools
import json
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx

from inferflux.errors import Conflict, NotFound
from inferflux.feed import Feed
from inferflux.lifecycle import Lifecycle, new_incarnation
from inferflux.pki import ensure_pki, ensure_secrets
from inferflux.policy.signature import Signer
from inferflux.rpc.mtls import Identity
from inferflux.rpc.server import RpcServer
from inferflux.v1 import decode_service_pb2 as decode_pb
from inferflux.v1 import policy_service_pb2 as policy_pb
from inferflux.v1 import prefill_service_pb2 as prefill_pb
from inferflux.v1 import registry_service_pb2 as registry_pb
from inferflux.v1 import types_pb2 as pb
from inferflux.v1.decode_service_pb2_grpc import DecodeServiceServicer, add_DecodeServiceServicer_to_server
from inferflux.v1.limits_service_pb2_grpc import LimitsServiceServicer, add_LimitsServiceServicer_to_server
from inferflux.v1.policy_service_pb2_grpc import PolicyServiceServicer, add_PolicyServiceServicer_to_server
from inferflux.v1.prefill_service_pb2_grpc import PrefillServiceServicer, add_PrefillServiceServicer_to_server
from inferflux.v1.registry_service_pb2_grpc import RegistryServiceServicer, add_RegistryServiceServicer_to_server
from services.gateway.__main__ import serve
from services.gateway.server import bind
from services.gateway.settings import Settings

MODEL = "tiny"
ADMIN_KEY, GENERATE_KEY, READ_KEY = "test-key-admin", "test-key-generate", "test-key-read"
PULSE_S = 0.05
SCOPES = {"generate": policy_pb.SCOPE_GENERATE, "read": policy_pb.SCOPE_READ, "admin": policy_pb.SCOPE_ADMIN}
FINGERPRINT = pb.ModelFingerprint(weights_digest="w", dtype="float32", layout="l", block_size=16)
GATEWAY_ONLY = frozenset({"gateway"})


async def until(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


class FakePolicy(PolicyServiceServicer):
    """Keys in a dictionary, pushed at once."""

    def __init__(self, pepper: bytes, seed: bytes) -> None:
        self._pepper = pepper
        self._signer = Signer(seed)
        self.policy: policy_pb.PolicyRevision | None = None
        self.audit: list[dict[str, Any]] = []
        self.reports: list[policy_pb.ReportPolicyRequest] = []
        self.revision = 0
        self.keys: dict[str, policy_pb.KeyRecord] = {}
        self.feed: Feed[policy_pb.PolicySnapshot] = Feed()
        for secret, scope in ((ADMIN_KEY, "admin"), (GENERATE_KEY, "generate"), (READ_KEY, "read")):
            self.add(secret, scope)

    def add(self, secret: str, *scopes: str, tenant: str = "default", **fields: Any) -> policy_pb.KeyRecord:
        digest = hmac.digest(self._pepper, secret.encode(), hashlib.sha256)
        key_id = "key_" + digest.hex()[:12]
        record = policy_pb.KeyRecord(
            key_id=key_id, secret_hash=digest, tenant=tenant, scopes=[SCOPES[s] for s in scopes], **fields
        )
        self.keys[key_id] = record
        self.publish(self.revision + 1)
        return record

    def publish(self, revision: int) -> None:
        self.revision = revision
        keys = self.keys.values()
        self.feed.publish(revision, policy_pb.PolicySnapshot(revision=revision, keys=keys, policy=self.policy))

    async def WatchSnapshot(self, request, context) -> AsyncIterator[policy_pb.WatchSnapshotResponse]:
        async for _, snapshot in self.feed.watch():
            data = snapshot.SerializeToString()
            yield policy_pb.WatchSnapshotResponse(snapshot=data, signature=self._signer.sign(data))

    async def ReportPolicy(self, request, context) -> policy_pb.ReportPolicyResponse:
        self.reports.append(request)
        return policy_pb.ReportPolicyResponse()

    async def AppendAudit(self, request, context) -> policy_pb.AppendAuditResponse:
        self.audit += [json.loads(record) for record in request.records]
        return policy_pb.AppendAuditResponse()

    def apply(self, document: dict[str, Any]) -> None:
        """Push another policy document."""
        revision, stage = self.revision + 1, policy_pb.POLICY_STAGE_LIVE
        data = json.dumps(document).encode()
        self.policy = policy_pb.PolicyRevision(revision=revision, document=data, stage=stage)
        self.publish(revision)

    async def CreateKey(self, request, context) -> policy_pb.CreateKeyResponse:
        secret = request.secret or f"made-by-the-service-{len(self.keys)}"
        digest = hmac.digest(self._pepper, secret.encode(), hashlib.sha256)
        if any(record.secret_hash == digest for record in self.keys.values()):
            raise Conflict("exists")
        scopes = [name for name, number in SCOPES.items() if number in request.scopes]
        record = self.add(secret, *scopes, tenant=request.tenant or "default", name=request.name)
        if request.HasField("expires_at"):
            record.expires_at.CopyFrom(request.expires_at)
        return policy_pb.CreateKeyResponse(key=record, secret=secret, revision=self.revision)

    async def ListKeys(self, request, context) -> policy_pb.ListKeysResponse:
        return policy_pb.ListKeysResponse(keys=self.keys.values(), revision=self.revision)

    async def RevokeKey(self, request, context) -> policy_pb.RevokeKeyResponse:
        if request.key_id not in self.keys:
            raise NotFound(f"no key {request.key_id!r}")
        self.revoke(request.key_id)
        return policy_pb.RevokeKeyResponse(revision=self.revision)

    def revoke(self, key_id: str) -> None:
        del self.keys[key_id]
        self.publish(self.revision + 1)


def new_policy(root: Path) -> FakePolicy:
    """Make a policy service that knows only the tests' own keys."""
    pepper, seed = ((root / "secrets" / name).read_bytes() for name in ("pepper.key", "snapshot.key"))
    return FakePolicy(pepper, seed)


class FakeRegistry(RegistryServiceServicer):
    """Workers in a dictionary, pushed at once."""

    def __init__(self) -> None:
        self.revision = 0
        self.workers: dict[str, registry_pb.WorkerRecord] = {}
        self.models = [registry_pb.ModelRecord(name=MODEL, max_model_len=2048, is_default=True)]
        self.feed: Feed[registry_pb.RegistrySnapshot] = Feed()
        self.publish()

    def put(self, record: registry_pb.WorkerRecord) -> None:
        self.workers[record.worker_id] = record
        self.publish()

    def remove(self, worker_id: str) -> None:
        del self.workers[worker_id]
        self.publish()

    def publish(self) -> None:
        self.revision += 1
        workers, models = self.workers.values(), self.models
        snapshot = registry_pb.RegistrySnapshot(revision=self.revision, workers=workers, models=models)
        self.feed.publish(self.revision, snapshot)

    async def WatchSnapshot(self, request, context) -> AsyncIterator[registry_pb.WatchRegistryResponse]:
        async for _, snapshot in self.feed.watch():
            yield registry_pb.WatchRegistryResponse(snapshot=snapshot)


@dataclass
class FakeWorker:
    """What both roles have: an identity, a state and a load that the test sets."""

    worker_id: str
    address: str = ""
    incarnation: str = field(default_factory=new_incarnation)
    state: int = pb.WORKER_STATE_READY
    load: dict[str, int] = field(default_factory=dict)
    is_silent: bool = False

    def __post_init__(self) -> None:
        """Roles set themselves up here."""

    def pulse(self) -> pb.Pulse:
        return pb.Pulse(incarnation=self.incarnation, state=self.state, num_slots=8, num_free_slots=8, **self.load)

    def record(self, role: int) -> registry_pb.WorkerRecord:
        return registry_pb.WorkerRecord(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            role=role,
            model=MODEL,
            address=self.address,
            state=self.state,
            fingerprint=FINGERPRINT,
            host_id="here",
            max_num_seqs=8,
            transports=("shm",),
        )


@dataclass
class Job:
    """One request on a fake decode worker."""

    start: decode_pb.Start
    emit: Callable[..., None]
    is_cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def body(self) -> dict[str, Any]:
        return json.loads(self.start.call.body)


Script = Callable[[Job], Awaitable[None]]
SSE_HEAD = pb.HttpHead(status=200, headers=[pb.Header(name="content-type", value="text/event-stream; charset=utf-8")])
JSON_HEAD = pb.HttpHead(status=200, headers=[pb.Header(name="content-type", value="application/json")])


def head(status: int, content_type: str = "application/json") -> pb.HttpHead:
    return pb.HttpHead(status=status, headers=[pb.Header(name="content-type", value=content_type)])


def end(**fields: Any) -> decode_pb.End:
    usage = pb.Usage(prompt_tokens=3, completion_tokens=2)
    return decode_pb.End(finish_reason="stop", usage=usage, **fields)


def failed(reason: str, status: int, *, is_retryable: bool = False) -> decode_pb.End:
    error = pb.ErrorDetail(reason=reason, message="it failed", http_status=status, is_retryable=is_retryable)
    return decode_pb.End(error=error)


def committed(job: Job) -> list[decode_pb.KvReport]:
    tickets = [prompt.ticket.ticket_id for prompt in job.start.prompts if prompt.HasField("ticket")]
    result = decode_pb.KV_RESULT_COMMITTED
    reports = [decode_pb.KvReport(ticket_id=t, result=result, num_bytes=1000, transport="nixl") for t in tickets]
    for report in reports:
        report.transfer_time.FromMilliseconds(2)
    return reports


async def two_tokens(job: Job) -> None:
    """Answer as a worker does, with two tokens."""
    if job.body.get("stream"):
        job.emit(head=SSE_HEAD, data=b'data: {"t": 1}\n\n')
        job.emit(kv=committed(job))
        await asyncio.sleep(0.01)
        job.emit(data=b'data: {"t": 2}\n\n')
        job.emit(data=b"data: [DONE]\n\n", end=end())
    else:
        job.emit(head=JSON_HEAD, data=b'{"text": "one two"}', kv=committed(job), end=end())


class FakeDecode(FakeWorker, DecodeServiceServicer):
    """A decode worker that does what its script says."""

    def __post_init__(self) -> None:
        self.script: Script = two_tokens
        self.jobs: list[Job] = []
        self.hellos: list[decode_pb.Hello] = []
        self.cancels: list[decode_pb.Cancel] = []
        self._outs: set[asyncio.Queue[decode_pb.StepBatch | None]] = set()

    def cut(self) -> None:
        """Break all streams."""
        for out in self._outs:
            out.put_nowait(None)

    def send(self, batch: decode_pb.StepBatch) -> None:
        for out in self._outs:
            out.put_nowait(batch)

    async def Session(self, request_iterator, context) -> AsyncIterator[decode_pb.StepBatch]:
        out: asyncio.Queue[decode_pb.StepBatch | None] = asyncio.Queue()
        self._outs.add(out)
        tasks = [asyncio.ensure_future(self._read(request_iterator, out)), asyncio.ensure_future(self._beat(out))]
        try:
            while (batch := await out.get()) is not None:
                yield batch
            await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
        finally:
            self._outs.discard(out)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def Recall(self, request, context) -> decode_pb.RecallResponse:
        for job in self.jobs:
            if job.start.context.request_id == request.request_id:
                return decode_pb.RecallResponse(context=job.start.context, call=job.start.call)
        raise NotFound(f"no request {request.request_id!r}")

    async def _beat(self, out: asyncio.Queue[decode_pb.StepBatch | None]) -> None:
        while True:
            if not self.is_silent:
                out.put_nowait(decode_pb.StepBatch(incarnation=self.incarnation, pulse=self.pulse()))
            await asyncio.sleep(PULSE_S)

    async def _read(self, commands: Any, out: asyncio.Queue[decode_pb.StepBatch | None]) -> None:
        running: dict[int, tuple[Job, asyncio.Task[None]]] = {}
        try:
            async for command in commands:
                if command.HasField("hello"):
                    self.hellos.append(command.hello)
                elif command.HasField("start"):
                    job = self._job(command.start, out)
                    self.jobs.append(job)
                    running[job.start.handle] = (job, asyncio.ensure_future(self.script(job)))
                else:
                    self.cancels.append(command.cancel)
                    if command.cancel.handle in running:
                        job, task = running.pop(command.cancel.handle)
                        job.is_cancelled.set()
                        task.cancel()
        finally:
            for _, task in running.values():
                task.cancel()
            await asyncio.gather(*(task for _, task in running.values()), return_exceptions=True)

    def _job(self, start: decode_pb.Start, out: asyncio.Queue[decode_pb.StepBatch | None]) -> Job:
        def emit(**fields: Any) -> None:
            delta = decode_pb.Delta(handle=start.handle, **fields)
            out.put_nowait(decode_pb.StepBatch(incarnation=self.incarnation, deltas=[delta]))

        return Job(start, emit)


class FakePrefill(FakeWorker, PrefillServiceServicer):
    """A prefill worker that issues a ticket per prompt. `hold` keeps requests until it is set."""

    def __post_init__(self) -> None:
        self.hold = asyncio.Event()
        self.hold.set()
        self.error: Exception | None = None
        self.answer: pb.HttpAnswer | None = None
        self.requests: list[prefill_pb.PrefillRequest] = []
        self.num_running = 0
        self.num_aborted = 0
        self.live: dict[str, str] = {}
        self.released: dict[str, str] = {}
        self.watches: list[prefill_pb.WatchRequest] = []
        self._ids = itertools.count()

    async def Prefill(self, request, context) -> prefill_pb.PrefillResponse:
        self.requests.append(request)
        self.num_running += 1
        try:
            await self.hold.wait()
        except asyncio.CancelledError:
            self.num_aborted += 1
            raise
        finally:
            self.num_running -= 1
        if self.error is not None:
            raise self.error
        if self.answer is not None:
            return prefill_pb.PrefillResponse(answer=self.answer)
        ticket_id = f"ticket-{next(self._ids)}"
        self.live[ticket_id] = request.context.request_id
        ticket = pb.SignedTicket(ticket_id=ticket_id, payload=b"p", mac=b"m")
        prompt = pb.PrefilledPrompt(prompt_digest=b"d", num_prompt_tokens=3, token_ids=[7], ticket=ticket)
        return prefill_pb.PrefillResponse(prefilled=prefill_pb.Prefilled(prompts=[prompt]))

    async def Release(self, request, context) -> prefill_pb.ReleaseResponse:
        of_requests = [t for t, request_id in self.live.items() if request_id in request.request_ids]
        ended = [t for t in (*request.ticket_ids, *of_requests) if self.live.pop(t, None) is not None]
        self.released.update(dict.fromkeys(ended, request.why))
        return prefill_pb.ReleaseResponse(num_released=len(ended))

    async def Watch(self, request, context) -> AsyncIterator[prefill_pb.WatchResponse]:
        self.watches.append(request)
        while True:
            if not self.is_silent:
                yield prefill_pb.WatchResponse(pulse=self.pulse())
            await asyncio.sleep(PULSE_S)


class FakeCluster:
    """All services around one gateway. Start and stop any of them at any time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        ensure_pki(root / "pki")
        ensure_secrets(root / "secrets")
        self.policy = new_policy(root)
        self.limits: LimitsServiceServicer | None = None
        self.registry = FakeRegistry()
        self._servers: dict[str, RpcServer] = {}
        self._names = itertools.count()
        self._kills: list[asyncio.Future[None]] = []

    @property
    def policy_address(self) -> str:
        return f"unix:{self.root}/policy.sock"

    @property
    def registry_address(self) -> str:
        return f"unix:{self.root}/registry.sock"

    async def start_policy(self) -> None:
        server = await self._serve("policy", self.policy_address, "PolicyService", "LimitsService")
        add_PolicyServiceServicer_to_server(self.policy, server.grpc)
        if self.limits is not None:
            add_LimitsServiceServicer_to_server(self.limits, server.grpc)
        await server.start()

    async def start_registry(self) -> None:
        server = await self._serve("registry", self.registry_address, "RegistryService")
        add_RegistryServiceServicer_to_server(self.registry, server.grpc)
        await server.start()

    async def add_decode(self, worker_id: str = "decode-0", **fields: Any) -> FakeDecode:
        worker = FakeDecode(worker_id, **fields)
        server = await self._serve(worker_id, self._address(worker), "DecodeService", role="decode")
        add_DecodeServiceServicer_to_server(worker, server.grpc)
        await server.start()
        self.registry.put(worker.record(pb.WORKER_ROLE_DECODE))
        return worker

    async def add_pooling(self, worker_id: str = "pooling-0", **fields: Any) -> FakeDecode:
        """A pooling worker speaks like a decode worker."""
        worker = FakeDecode(worker_id, **fields)
        server = await self._serve(worker_id, self._address(worker), "DecodeService", role="pooling")
        add_DecodeServiceServicer_to_server(worker, server.grpc)
        await server.start()
        self.registry.put(worker.record(pb.WORKER_ROLE_POOLING))
        return worker

    async def add_prefill(self, worker_id: str = "prefill-0", **fields: Any) -> FakePrefill:
        worker = FakePrefill(worker_id, **fields)
        server = await self._serve(worker_id, self._address(worker), "PrefillService", role="prefill")
        add_PrefillServiceServicer_to_server(worker, server.grpc)
        await server.start()
        self.registry.put(worker.record(pb.WORKER_ROLE_PREFILL))
        return worker

    async def kill(self, name: str) -> None:
        """Stop a service at once, without a word to the registry."""
        await self._servers.pop(name).stop(0)

    def kill_soon(self, name: str) -> None:
        """Stop a service from within: a server that is stopped by one of its own handlers takes the process with it."""
        self._kills.append(asyncio.ensure_future(self.kill(name)))

    async def close(self) -> None:
        await asyncio.gather(*self._kills, *(server.stop(0) for server in self._servers.values()))

    def _address(self, worker: FakeWorker) -> str:
        worker.address = worker.address or f"unix:{self.root}/w{next(self._names)}.sock"
        return worker.address

    async def _serve(self, name: str, address: str, *services: str, role: str = "") -> RpcServer:
        identity = Identity.load(self.root / "pki", role or name)
        server = RpcServer(identity, address, {f"/inferflux.v1.{service}/": GATEWAY_ONLY for service in services})
        self._servers[name] = server
        return server


@dataclass
class FakeClient:
    """A gateway that runs in this process, and an HTTP client with a key for it."""

    lifecycle: Lifecycle
    port: int
    http: httpx.AsyncClient
    task: asyncio.Task[None]

    async def chat(self, **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]} | fields
        return await self.http.post("/v1/chat/completions", json=body)

    async def ready(self) -> None:
        async with asyncio.timeout(10):
            while not self.lifecycle.readiness().ready:
                await asyncio.sleep(0.005)

    async def metric(self, name: str) -> float:
        """Sum of the samples whose line starts with `name`; labels in Prometheus's own order."""
        text = (await self.http.get("/metrics")).text
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


@asynccontextmanager
async def running_gateway(cluster: FakeCluster, **settings: Any) -> AsyncIterator[FakeClient]:
    """Run a gateway until the block ends. Events have no ids unless asked for: bytes are compared."""
    settings.setdefault("sse_event_ids", False)
    config = Settings(
        home=cluster.root,
        policy_address=cluster.policy_address,
        registry_address=cluster.registry_address,
        **settings,
    )
    sock = bind("127.0.0.1", 0)
    lifecycle = Lifecycle("gateway", "gateway-0")
    task = asyncio.ensure_future(serve(config, sock, lifecycle))
    port = sock.getsockname()[1]
    headers = {"authorization": f"Bearer {GENERATE_KEY}"}
    try:
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=20, trust_env=False
        ) as http:
            await until(lambda: lifecycle.state == "ready" or task.done())
            yield FakeClient(lifecycle, port, http, task)
    finally:
        lifecycle.begin_drain()
        await task
        sock.close()


@asynccontextmanager
async def fake_cluster(limits: LimitsServiceServicer | None = None) -> AsyncIterator[FakeCluster]:
    """Policy and registry, without workers. `limits`: what the policy service counts with."""
    async with AsyncExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ifx-")))
        cluster = FakeCluster(root)
        cluster.limits = limits
        await cluster.start_policy()
        await cluster.start_registry()
        stack.push_async_callback(cluster.close)
        yield cluster
