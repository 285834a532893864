"""Real service processes, and watches on their snapshots, for integration tests."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc

from inferflux.pki import ensure_pki, ensure_secrets
from inferflux.rpc.client import open_channel
from inferflux.rpc.mtls import Identity

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 20.0


@contextmanager
def temporary_home() -> Iterator[Path]:
    """Give a state directory with a PKI and secrets, and a path short enough for sockets."""
    home = Path(tempfile.mkdtemp(prefix="ifx-home-", dir="/tmp"))
    try:
        ensure_pki(home / "pki")
        ensure_secrets(home / "secrets")
        yield home
    finally:
        shutil.rmtree(home)


class Service:
    """One `python -m <module>` process on unix sockets below `home`; its log is `<home>/<instance>.log`."""

    def __init__(self, module: str, instance_id: str, home: Path, settings: Mapping[str, str]) -> None:
        self.role = module.rpartition(".")[2]
        self.home = home
        self.address = f"unix:{home}/{instance_id}.sock"
        self._module = module
        self._ops_path = f"{home}/{instance_id}.ops.sock"
        self._log_path = home / f"{instance_id}.log"
        self._environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPOSITORY),
            "INFERFLUX_HOME": str(home),
            "INFERFLUX_INSTANCE_ID": instance_id,
            "INFERFLUX_BIND": self.address,
            "INFERFLUX_OPS_ADDRESS": f"unix:{self._ops_path}",
            # Dies with the tests.
            "INFERFLUX_PDEATHSIG": "1",
        } | {f"INFERFLUX_{name.upper()}": value for name, value in settings.items()}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> Service:
        """Start it; see `until` and `is_ready` for when it serves."""
        assert self._process is None, "started already"
        with self._log_path.open("ab") as log:
            command = [sys.executable, "-m", self._module]
            self._process = subprocess.Popen(
                command, cwd=REPOSITORY, env=self._environ, stdin=subprocess.DEVNULL, stderr=log
            )
        return self

    def readiness(self) -> dict[str, Any]:
        """What /readyz says; empty while nothing answers."""
        try:
            return json.loads(self.get("/readyz"))
        except (OSError, http.client.HTTPException):
            return {}

    def is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        return bool(self.readiness().get("ready"))

    def get(self, path: str) -> str:
        """GET from the ops port. Raises OSError."""
        connection = http.client.HTTPConnection("localhost", timeout=5)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(5)
        try:
            connection.sock.connect(self._ops_path)
            connection.request("GET", path)
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def log(self) -> str:
        return self._log_path.read_text()

    def wait(self) -> int:
        """Wait for its end; returns the exit code."""
        assert self._process is not None
        code = self._process.wait(TIMEOUT_S)
        self._process = None
        return code

    def terminate(self) -> int:
        """Drain it (SIGTERM); returns the exit code."""
        os.kill(self.pid, signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """Kill it (SIGKILL) and wait for its death. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self.wait()

    def restart(self) -> Service:
        self.kill()
        return self.start()

    @asynccontextmanager
    async def channel(self, role: str) -> AsyncIterator[grpc.aio.Channel]:
        """Open a channel to it as a caller of `role`."""
        async with open_channel(self.address, Identity.load(self.home / "pki", role), self.role) as channel:
            yield channel


class Watcher:
    """Follows a WatchSnapshot like a gateway: opens it again with its newest revision whenever it breaks."""

    def __init__(
        self,
        call: Callable[[int], Any],
        revision: int = 0,
        read: Callable[[Any], Any] = lambda message: message.snapshot,
    ) -> None:
        self.snapshots: list[Any] = []
        self.num_opened = 0
        self.revision = revision
        self._call = call
        self._read = read

    @property
    def newest(self) -> Any:
        return self.snapshots[-1]

    async def until(self, condition: Callable[[Any], bool]) -> Any:
        """Wait until the newest snapshot meets the condition; returns it."""
        await until(lambda: bool(self.snapshots) and condition(self.newest))
        return self.newest

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Watcher]:
        task = asyncio.ensure_future(self._follow())
        try:
            yield self
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _follow(self) -> None:
        while True:
            stream = self._call(self.revision)
            self.num_opened += 1
            try:
                async for message in stream:
                    snapshot = self._read(message)
                    assert snapshot.revision >= self.revision, "a revision went back"
                    self.revision = snapshot.revision
                    self.snapshots.append(snapshot)
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.05)
            finally:
                stream.cancel()


async def until(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    """Wait until the condition holds; fail after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        await asyncio.sleep(0.002)
