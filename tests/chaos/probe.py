"""What the cluster's processes hold: by their own account (pulses, ticket counts) and by the kernel's (/proc)."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx

from inferflux.paths import Home
from inferflux.rpc.client import open_channel
from inferflux.rpc.mtls import Identity
from inferflux.v1 import types_pb2
from inferflux.v1 import worker_admin_service_pb2 as pb
from inferflux.v1.worker_admin_service_pb2_grpc import WorkerAdminServiceStub
from tests.support.cluster import Cluster, processes_of

RPC_S = 3.0
WORKERS = ("prefill", "decode")
ARENA = "memfd:inferflux-arena"
# Connections to peers come and go, and a client of gRPC keeps a few.
FD_SLACK = 12
UP = re.compile(r'^inferflux_worker_up\{role="(\w+)",worker="([\w-]+)"\} 1\.0$', re.MULTILINE)

Process = dict[str, Any]


@dataclass(slots=True)
class Holdings:
    """What is held that no request needs any more. Empty when all is well."""

    blocks: int = 0
    slots: int = 0
    tickets: int = 0
    requests: int = 0
    complaints: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.blocks or self.slots or self.tickets or self.requests or self.complaints)


class Probe:
    """Looks at one cluster. Never changes anything."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._home = Home(cluster.home)
        self._identity = Identity.load(self._home.pki, "operator")
        self._channels: dict[str, tuple[str, grpc.aio.Channel]] = {}
        self._first_fds: dict[tuple[str, int], int] = {}
        self._lasting_blocks: dict[str, int] = {}
        self._offsets: dict[Path, int] = {}

    async def close(self) -> None:
        """Close all channels."""
        for _, channel in self._channels.values():
            await channel.close()

    async def processes(self) -> dict[str, Process]:
        """State of all processes, by id."""
        return {p["id"]: p for p in await asyncio.to_thread(lambda: self._cluster.processes)}

    async def up(self, gateway: str) -> frozenset[str]:
        """Workers that a gateway has a living stream to; empty when the gateway does not answer."""
        path = str(self._home.run / f"{gateway}.ops.sock")
        transport = httpx.AsyncHTTPTransport(uds=path)
        with suppress(httpx.HTTPError):
            async with httpx.AsyncClient(transport=transport, base_url="http://ops", timeout=1.0) as client:
                text = (await client.get("/metrics")).text
            return frozenset(worker for _, worker in UP.findall(text))
        return frozenset()

    async def learn(self, processes: Iterable[Process]) -> None:
        """Take what idle engines hold for ever (vLLM keeps a block of zeros) as nothing."""
        for process in processes:
            if process["role"] in WORKERS and process["ready"]:
                pulse = (await self._status(process)).pulse
                self._lasting_blocks[process["role"]] = pulse.num_blocks - pulse.num_free_blocks

    async def held(self, processes: Iterable[Process]) -> Holdings:
        """What idle workers still hold."""
        holdings = Holdings()
        for process in processes:
            if process["role"] not in WORKERS or not process["ready"]:
                continue
            try:
                self._add(holdings, process, (await self._status(process)).pulse)
                if process["role"] == "prefill":
                    self._check_counts(holdings, process, await self._tickets(process))
            except grpc.aio.AioRpcError as e:
                holdings.complaints.append(f"{process['id']} does not answer: {e.code().name}")
        return holdings

    def open_files(self, processes: Iterable[Process]) -> list[str]:
        """Name the processes that have more files open than soon after their start."""
        complaints = []
        for process in processes:
            key = process["id"], process["pid"] or 0
            with suppress(OSError):
                num = sum(1 for _ in Path(f"/proc/{process['pid']}/fd").iterdir())
                first = self._first_fds.setdefault(key, num)
                if num > first + FD_SLACK:
                    complaints.append(f"{process['id']} has {num} files open, {first} at first")
        return complaints

    def arenas(self) -> tuple[int, int]:
        """Bytes of arenas whose worker lives, and of those that somebody still maps after their worker's death."""
        owned: dict[str, int] = {}
        mapped: dict[str, int] = {}
        for pid, command in processes_of(self._cluster.home).items():
            own = "prefill" in command or _name(pid).startswith("ifx-prefill")
            for inode, num_bytes in _mapped_arenas(pid).items():
                (owned if own else mapped)[inode] = num_bytes
        return sum(owned.values()), sum(n for inode, n in mapped.items() if inode not in owned)

    def new_lines(self, process_id: str) -> list[dict[str, Any]]:
        """Records that a process has logged since the last call."""
        path = self._home.logs / f"{process_id}.log"
        with suppress(FileNotFoundError), path.open("rb") as log:
            if log.seek(0, os.SEEK_END) < self._offsets.get(path, 0):
                self._offsets[path] = 0  # a new file: the old one was rotated away
            log.seek(self._offsets.get(path, 0))
            data = log.read()
            end = data.rfind(b"\n") + 1
            self._offsets[path] = self._offsets.get(path, 0) + end
            return [record for line in data[:end].splitlines() if (record := _record(line))]
        return []

    async def _status(self, process: Process) -> pb.GetStatusResponse:
        stub: Any = WorkerAdminServiceStub(await self._channel(process))
        response: pb.GetStatusResponse = await stub.GetStatus(pb.GetStatusRequest(), timeout=RPC_S)
        return response

    async def _tickets(self, process: Process) -> pb.ListTicketsResponse:
        stub: Any = WorkerAdminServiceStub(await self._channel(process))
        response: pb.ListTicketsResponse = await stub.ListTickets(pb.ListTicketsRequest(), timeout=RPC_S)
        return response

    async def _channel(self, process: Process) -> grpc.aio.Channel:
        """One channel per start of a worker: an older one would wait before it connects again."""
        name, start = process["id"], f"{process['pid']}"
        known = self._channels.get(name)
        if known is None or known[0] != start:
            if known is not None:
                await known[1].close()
            channel = open_channel(self._home.socket(name), self._identity, process["role"])
            self._channels[name] = known = start, channel
        return known[1]

    def _add(self, holdings: Holdings, process: Process, pulse: types_pb2.Pulse) -> None:
        lasting = self._lasting_blocks.get(process["role"], 0)
        holdings.blocks += max(0, pulse.num_blocks - pulse.num_free_blocks - lasting)
        holdings.slots += pulse.num_slots - pulse.num_free_slots
        holdings.tickets += pulse.num_live_tickets
        holdings.requests += pulse.num_running + pulse.num_waiting

    @staticmethod
    def _check_counts(holdings: Holdings, process: Process, counts: pb.ListTicketsResponse) -> None:
        """Every ticket ends once: issued = released + expired + revoked + live; and nothing outstays its lease."""
        if counts.num_leaked or counts.num_leaked_slots:
            leaked = f"{counts.num_leaked} tickets and {counts.num_leaked_slots} slots"
            holdings.complaints.append(f"{process['id']}: {leaked} have leaked")
        ended = counts.num_released + counts.num_expired + counts.num_revoked
        if counts.num_issued != ended + counts.num_live:
            holdings.complaints.append(
                f"{process['id']}: {counts.num_issued} tickets issued, {ended} ended and {counts.num_live} live"
            )


def _mapped_arenas(pid: int) -> dict[str, int]:
    """Arenas that a process has mapped: bytes by inode."""
    sizes: Counter[str] = Counter()
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if ARENA in line:
                span, _, _, _, inode, *_ = line.split()
                start, end = (int(part, 16) for part in span.split("-"))
                sizes[inode] = max(sizes[inode], end - start)
    return dict(sizes)


def _name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _record(line: bytes) -> dict[str, Any] | None:
    with suppress(ValueError):
        record = json.loads(line)
        return record if isinstance(record, dict) else None
    return None
