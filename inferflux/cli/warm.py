"""The supervisor's side of the zygote: starts workers through it, and without it when it fails."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from inferflux.cli.child import Running, Spawned, rotate
from inferflux.cli.pdeathsig import die_with_parent
from inferflux.cli.plan import ProcessSpec
from inferflux.cli.zygote import MAX_MESSAGE

_log = logging.getLogger(__name__)


class ZygoteLost(Exception):
    """The zygote ended, or could not even start."""


class Forked:
    """A worker that the zygote forked for us."""

    def __init__(self, pid: int, ended: asyncio.Future[int]) -> None:
        self.pid = pid
        self._ended = ended

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)


class WarmStarter:
    """Owns at most one zygote; starts it when first needed, and anew when it was lost."""

    def __init__(self, log: Path) -> None:
        self._log_file = log
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._reader: asyncio.Task[None] | None = None
        self._ids = itertools.count(1)
        self._started: dict[int, asyncio.Future[Running]] = {}
        self._ended: dict[int, asyncio.Future[int]] = {}

    async def start(self, spec: ProcessSpec) -> Running:
        """Fork a worker; falls back to starting it cold."""
        try:
            return await self._fork(spec)
        except (ZygoteLost, OSError) as e:
            _log.warning("no warm start for %s: %s; see %s", spec.id, e, self._log_file)
            return Spawned(spec)

    def close(self) -> None:
        """End the zygote and with it whatever it forked. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _fork(self, spec: ProcessSpec) -> Running:
        if self._socket is None:
            self._launch(spec)
        assert self._socket is not None  # noqa: S101 - for mypy
        number = next(self._ids)
        started: asyncio.Future[Running] = asyncio.get_running_loop().create_future()
        self._started[number] = started
        order = {"start": number, "script": Path(spec.command[0]).name, "env": dict(spec.env), "log": str(spec.log)}
        await asyncio.get_running_loop().sock_sendall(self._socket, json.dumps(order).encode())
        return await started

    def _launch(self, spec: ProcessSpec) -> None:
        """Start a zygote in the environment of the first worker that needs one."""
        self.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        rotate(self._log_file)
        with theirs, self._log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "inferflux.cli.zygote"],
                env=dict(spec.env),
                stdin=theirs.fileno(),
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent(),  # noqa: PLW1509 - the supervisor has one thread
            )
        self._socket = ours
        self._reader = asyncio.create_task(self._read(ours), name="zygote")

    async def _read(self, ours: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with suppress(OSError):
            while packet := await loop.sock_recv(ours, MAX_MESSAGE):
                self._take(json.loads(packet))
        self._lose()

    def _take(self, message: dict[str, Any]) -> None:
        loop = asyncio.get_running_loop()
        if "started" in message:
            ended = self._ended[message["pid"]] = loop.create_future()
            started = self._started.pop(message["started"])
            if not started.done():
                started.set_result(Forked(message["pid"], ended))
        elif (ended_ := self._ended.pop(message["exited"], None)) is not None and not ended_.done():
            ended_.set_result(message["status"])

    def _lose(self) -> None:
        """All that came from a lost zygote died with it."""
        for started in self._started.values():
            if not started.done():
                started.set_exception(ZygoteLost("the zygote ended"))
        for ended in self._ended.values():
            if not ended.done():
                ended.set_result(-9)
        self._started.clear()
        self._ended.clear()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
