"""The supervisor's side of the zygote: starts workers through it, and without it when it fails."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from inferflux.cli.child import Running, Spawned, end_group, rotate
from inferflux.cli.pdeathsig import die_with_parent
from inferflux.cli.plan import ProcessSpec
from inferflux.cli.zygote import MAX_MESSAGE, PRELOAD

_log = logging.getLogger(__name__)
T = TypeVar("T")


class ZygoteLost(Exception):
    """The zygote ended, or could not even start."""


class Forked:
    """A worker that the zygote forked for us."""

    def __init__(self, pid: int, ended: asyncio.Future[int]) -> None:
        self.pid = pid
        self._ended = ended

    async def wait(self) -> int:
        status = await self._ended
        await end_group(self.pid)
        return status


class WarmStarter:
    """Owns at most one zygote; starts it when first needed, and anew when it was lost."""

    def __init__(self, log: Path, modules: Sequence[str] = PRELOAD) -> None:
        self._log_file = log
        self._modules = modules
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._reader: asyncio.Task[None] | None = None
        self._ids = itertools.count(1)
        self._num_forks = 0
        self._started: dict[int, asyncio.Future[Running]] = {}
        self._ended: dict[int, asyncio.Future[int]] = {}
        self._has_failed = False

    async def start(self, spec: ProcessSpec) -> Running:
        """Fork a worker; falls back to starting it cold, for good if a zygote never gets as far as forking."""
        if not self._has_failed:
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
        try:
            await asyncio.get_running_loop().sock_sendall(self._socket, json.dumps(order).encode())
            return await started
        finally:
            self._started.pop(number, None)

    def _launch(self, spec: ProcessSpec) -> None:
        """Start a zygote in the environment of the first worker that needs one."""
        self.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        rotate(self._log_file)
        with theirs, self._log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "inferflux.cli.zygote", *self._modules],
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
        if "started" in message:
            self._num_forks += 1
            ended = self._ended[message["pid"]] = asyncio.get_running_loop().create_future()
            settle(self._started.get(message["started"]), Forked(message["pid"], ended))
        else:
            settle(self._ended.pop(message["exited"], None), message["status"])

    def _lose(self) -> None:
        """All that came from a lost zygote dies with it."""
        self._has_failed = self._num_forks == 0
        for started in self._started.values():
            if not started.done():
                started.set_exception(ZygoteLost("the zygote ended"))
        for ended in self._ended.values():
            settle(ended, -signal.SIGKILL)
        self._ended.clear()
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def settle(future: asyncio.Future[T] | None, value: T) -> None:
    """Give a future its value, if anybody still waits for it."""
    if future is not None and not future.done():
        future.set_result(value)
