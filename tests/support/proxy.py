"""A proxy between two processes that delays, cuts, resets or half-closes what passes, over TCP or unix sockets.

    async with Proxy.before("unix:/run/decode-0.sock") as proxy:      # takes the place of the socket
        proxy.cut("up", "down")                                      # nobody hears anything, and nobody is told
        ...
        proxy.heal()                                                 # what was held arrives, in order

`up` is from the client that connects to the server behind the proxy, `down` the other way.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Direction = Literal["up", "down"]
CHUNK_BYTES = 1 << 16
_RST = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset


@dataclass(slots=True)
class Way:
    """One direction of all connections. `limit`: connections break after so many more bytes; None: never."""

    is_open: asyncio.Event = field(default_factory=asyncio.Event)
    delay_s: float = 0.0
    limit: int | None = None
    num_bytes: int = 0
    num_held: int = 0

    def __post_init__(self) -> None:
        self.is_open.set()


class Proxy:
    """Passes connections on. `bytes_passed` and `bytes_held` are the evidence of what it did."""

    def __init__(self, listen: str, target: str) -> None:
        self._listen = listen
        self._target = target
        self._ways: dict[Direction, Way] = {"up": Way(), "down": Way()}
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @classmethod
    @asynccontextmanager
    async def before(cls, address: str) -> AsyncIterator[Proxy]:
        """Take the place of a unix socket: who connects from now on comes through here, who is connected stays so."""
        path = Path(address.removeprefix("unix:"))
        real = path.with_name(f"{path.name}.real")
        path.rename(real)  # noqa: ASYNC240 - one system call
        proxy = cls(address, f"unix:{real}")
        await proxy.start()
        try:
            yield proxy
        finally:
            await proxy.close()
            real.rename(path)

    @property
    def bytes_passed(self) -> dict[Direction, int]:
        return {name: way.num_bytes for name, way in self._ways.items()}

    @property
    def bytes_held(self) -> dict[Direction, int]:
        return {name: way.num_held for name, way in self._ways.items()}

    @property
    def num_connections(self) -> int:
        return len(self._writers) // 2

    async def start(self) -> str:
        """Listen; returns the address."""
        if self._listen.startswith("unix:"):
            self._server = await asyncio.start_unix_server(self._serve, self._listen.removeprefix("unix:"))
            return self._listen
        host, _, port = self._listen.rpartition(":")
        self._server = await asyncio.start_server(self._serve, host, int(port))
        return f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        """Stop listening and break all connections."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self, *directions: Direction) -> None:
        """Let nothing through any more, and tell nobody."""
        for direction in directions:
            self._ways[direction].is_open.clear()

    def heal(self) -> None:
        """Let everything through again; what was held arrives first."""
        for way in self._ways.values():
            way.delay_s, way.limit, way.num_held = 0.0, None, 0
            way.is_open.set()

    def delay(self, span_s: float, *directions: Direction) -> None:
        """Let each piece wait."""
        for direction in directions:
            self._ways[direction].delay_s = span_s

    def limit(self, num_bytes: int, direction: Direction) -> None:
        """Reset connections after so many more bytes of a direction, even amid a message."""
        self._ways[direction].limit = num_bytes

    def reset(self) -> None:
        """Break all connections as the kernel does for a dead peer."""
        for writer in tuple(self._writers):
            sock = writer.get_extra_info("socket")
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
            writer.transport.abort()

    def redirect(self, target: str) -> None:
        """Connect to another server from now on; connections to the one before break."""
        self._target = target
        self.reset()

    def half_close(self, direction: Direction) -> None:
        """End one direction of all connections, as a peer does that says nothing more and still listens."""
        for writer in tuple(self._writers):
            if writer.get_extra_info("direction") == direction:
                writer.write_eof()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            target_reader, target_writer = await self._connect()
        except (OSError, asyncio.CancelledError):
            writer.transport.abort()
            return
        both = {writer, target_writer}
        _name(target_writer, "up")
        _name(writer, "down")
        self._writers |= both
        try:
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(reader, target_writer, "up"))
                pumps.create_task(self._pump(target_reader, writer, "down"))
        except* OSError:
            pass  # one side is gone, and with it the other
        finally:
            self._writers -= both
            for each in both:
                each.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._target.startswith("unix:"):
            return await asyncio.open_unix_connection(self._target.removeprefix("unix:"))
        host, _, port = self._target.rpartition(":")
        return await asyncio.open_connection(host, int(port))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction) -> None:
        way = self._ways[direction]
        while data := await reader.read(CHUNK_BYTES):
            await self._pass(way)
            if not way.is_open.is_set():
                way.num_held += len(data)
                await way.is_open.wait()
            if way.limit is not None:
                data, way.limit = data[: way.limit], way.limit - len(data)
            way.num_bytes += len(data)
            writer.write(data)
            await writer.drain()
            if way.limit is not None and way.limit <= 0:
                way.limit = None
                raise ConnectionResetError("the limit of bytes is reached")
        with suppress(OSError, RuntimeError):
            writer.write_eof()

    @staticmethod
    async def _pass(way: Way) -> None:
        if way.delay_s:
            await asyncio.sleep(way.delay_s)


def _name(writer: asyncio.StreamWriter, direction: Direction) -> None:
    """Note on a connection which way its bytes go."""
    writer.transport._extra["direction"] = direction  # type: ignore[attr-defined]
