"""How prefill and decode workers agree on a transport, as real processes with the simulated engine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import grpc
import httpx
import pytest

from inferflux.kv import nixl
from inferflux.v1 import prefill_service_pb2 as prefill_pb
from inferflux.v1 import worker_admin_service_pb2 as admin_pb
from inferflux.v1.prefill_service_pb2_grpc import PrefillServiceStub
from inferflux.v1.worker_admin_service_pb2_grpc import WorkerAdminServiceStub
from tests.support.cluster import Cluster
from tests.support.service import Service, temporary_home, until
from tests.support.small_gateway import SmallGateway, completion, context

PROMPTS = count(1)
SETTINGS = {"engine": "sim", "model": "m", "kv_cache_bytes": str(32 << 20), "kv_arena_bytes": str(8 << 20)}


@dataclass
class Pair:
    """One prefill and one decode worker."""

    prefill: Service
    decode: Service

    async def ready(self) -> Pair:
        await until(lambda: self.prefill.is_ready() and self.decode.is_ready())
        return self

    async def ask(self, num: int = 1) -> list[tuple[list[tuple[str, str]], bool]]:
        """Send requests, all at once, by both workers.

        Returns for each the fate of its ticket, and whether its text is what decode says alone.
        """
        async with SmallGateway.to(self.prefill, self.decode) as gateway, gateway.watching():
            session = await gateway.session()

            async def ask_one() -> tuple[list[tuple[str, str]], bool]:
                call, ctx = completion(f"Prompt {next(PROMPTS)} " * 12), context()
                prompts = await gateway.prefill(call, ctx)
                answer = await (await session.start(call, prompts, ctx)).wait()
                alone = await (await session.start(call)).wait()
                assert answer.end.error is alone.end.error is None
                return answer.reports, answer.token_ids == alone.token_ids

            return await asyncio.gather(*(ask_one() for _ in range(num)))

    async def probe(self, incarnation: str) -> admin_pb.ProbePathResponse:
        request = admin_pb.ProbePathRequest(
            worker_id="prefill-0", incarnation=incarnation, address=self.prefill.address
        )
        async with self.decode.channel("gateway") as channel:
            return await WorkerAdminServiceStub(channel).ProbePath(request)

    async def incarnation(self) -> str:
        async with self.prefill.channel("gateway") as channel:
            status = await WorkerAdminServiceStub(channel).GetStatus(admin_pb.GetStatusRequest())
        return status.pulse.incarnation

    def sample(self, name: str) -> float:
        """The value of one of the decode worker's samples, 0 without it."""
        lines = (line.rpartition(" ") for line in self.decode.get("/metrics").splitlines())
        return next((float(value) for sample, _, value in lines if sample == name), 0.0)


@contextmanager
def pair(prefill: dict[str, str], decode: dict[str, str]) -> Iterator[Pair]:
    with temporary_home() as home, ExitStack() as stack:
        (home / "run").mkdir()
        services = []
        for role, settings in (("prefill", prefill), ("decode", decode)):
            service = Service(f"services.{role}", f"{role}-0", home, SETTINGS | settings)
            service._environ["UCX_TLS"] = "tcp,self"  # as between hosts; on one, UCX would let the kernel copy
            stack.callback(service.kill)
            services.append(service.start())
        yield Pair(*services)


BYTES = 'inferflux_kv_transfer_bytes_total{transport="%s"}'
FALLBACK = 'inferflux_transport_fallback_total{from="%s",to="%s"}'
SPEED = 'inferflux_kv_path_gbps{peer="prefill-0",transport="%s"}'
READ = ([("committed", "")], True)
NIXL = {"kv_transport": "nixl"}
SHM = {"kv_transport": "shm"}


@pytest.fixture
async def forced() -> AsyncIterator[Pair]:
    """Both may only use nixl."""
    with pair(NIXL, NIXL) as workers:
        yield await workers.ready()


def listening(pid: int) -> int:
    """Count the TCP ports that a process listens on."""
    inodes = set(sockets(pid))
    lines = (Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()).splitlines()
    rows = (line.split() for line in lines)
    return sum(row[3] == "0A" and row[9] in inodes for row in rows)


def sockets(pid: int) -> Iterator[str]:
    """The inodes of a process's sockets."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            kind, _, inode = str(fd.readlink()).partition(":")
            if kind == "socket":
                yield inode[1:-1]


async def test_by_default_workers_of_one_host_share_memory_and_open_no_ports() -> None:
    """Agents listen, unauthenticated; nobody pays for what no pair needs."""
    with pair({}, {}) as workers:
        await workers.ready()

        assert await workers.ask() == [READ]
        assert workers.sample(BYTES % "shm") > 0
        assert workers.sample(BYTES % "nixl") == 0
        assert [listening(service.pid) for service in (workers.prefill, workers.decode)] == [0, 0]


async def test_forced_nixl_serves_requests(forced: Pair) -> None:
    """One handshake, then one-sided reads; the tokens are computed from the bytes that came."""
    assert await forced.ask() == [READ]
    assert await forced.ask() == [READ]

    assert forced.sample(BYTES % "nixl") > 0
    assert forced.sample(BYTES % "shm") == 0
    assert forced.sample(SPEED % "nixl") > 0
    assert not (forced.prefill.home / "run" / "prefill-0.arena.sock").exists()


async def test_many_first_requests_share_one_handshake(forced: Pair) -> None:
    assert await forced.ask(6) == [READ] * 6
    calls = [line for line in forced.prefill.get("/metrics").splitlines() if "Handshake" in line and "_count" in line]
    assert [line.rpartition(" ")[2] for line in calls] == ["1.0"]


async def test_a_socket_that_does_not_answer_is_passed_by(tmp_path: Path) -> None:
    """Two containers of one host share its identity, not its files: nixl takes over within the request."""
    with pair({"run_dir": str(tmp_path)}, {}) as workers:
        await workers.ready()
        (tmp_path / "prefill-0.arena.sock").unlink()

        assert await workers.ask() == [READ]
        assert workers.sample(BYTES % "nixl") > 0
        assert workers.sample(FALLBACK % ("shm", "nixl")) == 1


async def test_without_a_common_transport_the_prompt_is_computed_again() -> None:
    with pair(NIXL, SHM) as workers:
        await workers.ready()

        assert await workers.ask() == [([("recomputed", "unreachable")], True)]


async def test_a_restarted_worker_is_met_anew(forced: Pair) -> None:
    """Tickets of its last life are stale, those of its new one are read; the dead peer's connections are gone."""
    assert await forced.ask() == [READ]
    num_sockets = len(list(sockets(forced.decode.pid)))
    for _ in range(3):
        forced.prefill.restart()
        await until(forced.prefill.is_ready)

        assert await forced.ask() == [READ]
    assert len(list(sockets(forced.decode.pid))) < num_sockets + 3


async def test_a_lost_owner_costs_a_recomputation_within_the_deadline(forced: Pair) -> None:
    """The answer comes, it is right, and the failure is counted."""
    assert await forced.ask() == [READ]
    call, ctx = completion(f"Prompt {next(PROMPTS)} " * 12), context(time_left_s=20.0)
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(SmallGateway.to(forced.prefill, forced.decode))
        await stack.enter_async_context(gateway.watching())
        session = await gateway.session()
        prompts = await gateway.prefill(call, ctx)
        os.kill(forced.prefill.pid, signal.SIGKILL)
        started_at = time.monotonic()
        answer = await (await session.start(call, prompts, ctx)).wait()

        assert time.monotonic() - started_at < nixl.STALL_S + 8
        assert answer.reports == [("recomputed", "unreachable")]
        assert answer.token_ids == (await (await session.start(call)).wait()).token_ids
        assert forced.sample(FALLBACK % ("nixl", "recompute")) == 1


async def test_a_probe_moves_bytes_over_the_path_that_requests_take(forced: Pair) -> None:
    probe = await forced.probe(await forced.incarnation())

    assert probe.transport == "nixl"
    assert probe.num_bytes > 1 << 20
    assert forced.sample(SPEED % "nixl") > 0
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await forced.probe("another-life")
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_only_decode_workers_may_shake_hands(forced: Pair) -> None:
    """What a handshake tells gives access to the whole arena."""
    for role in ("gateway", "operator", "prefill"):
        async with forced.prefill.channel(role) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await PrefillServiceStub(channel).Handshake(prefill_pb.HandshakeRequest(incarnation="x"))
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_a_forced_transport_serves_a_whole_cluster_and_shows_in_the_matrix() -> None:
    """Through gateway and registry, as users and operators see it."""
    with Cluster.start(prefill=2, decode=2, env={"INFERFLUX_KV_TRANSPORT": "nixl", "UCX_TLS": "tcp,self"}) as cluster:
        with httpx.Client(base_url=cluster.url, headers=cluster.headers, timeout=30) as client:
            for n in range(4):
                body = {"model": cluster.model, "prompt": f"Prompt {n} " * 40, "max_tokens": 5}
                client.post("/v1/completions", json=body).raise_for_status()
        matrix = json.loads(cluster.inferctl("pools", "--matrix", "-o", "json").stdout)["data"]
        workers = json.loads(cluster.inferctl("pools", "-o", "json").stdout)["data"]
        table = cluster.inferctl("pools", "--matrix").stdout
        metrics = cluster.metrics("decode", 0) + cluster.metrics("decode", 1)

    assert {(path["decode"], path["prefill"]) for path in matrix} == {
        (f"decode-{d}", f"prefill-{p}") for d in (0, 1) for p in (0, 1)
    }
    assert all((path["transport"], path["state"]) == ("nixl", "ok") and path["gbps"] > 0 for path in matrix)
    assert all(worker["transports"] == ["nixl"] for worker in workers)
    assert table.count("nixl") == 4
    assert 'kv_transfer_bytes_total{transport="nixl"}' in metrics
    assert 'kv_transfer_bytes_total{transport="shm"}' not in metrics


def test_no_request_goes_where_its_blocks_could_not_be_read() -> None:
    """A decode worker tries its paths when it comes; the one that it can't open is not used."""
    with Cluster.start(prefill=2, decode=1, env={"INFERFLUX_KV_TRANSPORT": "shm"}) as cluster:
        (cluster.home / "run" / "prefill-0.arena.sock").unlink()
        cluster.wait_restarted(cluster.kill("decode"))
        matrix = json.loads(cluster.inferctl("pools", "--matrix", "-o", "json").stdout)["data"]
        with httpx.Client(base_url=cluster.url, headers=cluster.headers, timeout=30) as client:
            for n in range(4):
                body = {"model": cluster.model, "prompt": f"Prompt {n} " * 40, "max_tokens": 5}
                client.post("/v1/completions", json=body).raise_for_status()
        metrics = cluster.metrics("gateway", 0)

    assert {path["prefill"]: path["state"] for path in matrix} == {"prefill-0": "KV_UNREACHABLE", "prefill-1": "ok"}
    assert "inferflux_kv_rejected_total{" not in metrics
