"""The HTTP server: uvicorn as a part of this process, not its owner. Signals and the loop are ours."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, cast

import uvicorn

from inferflux.errors import ConfigError
from services.gateway.connection import Connection, ConnectionLimits
from services.gateway.settings import Settings

BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """Take the port, without listening yet. Raises ConfigError when it is in use or not ours to take."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as e:
        raise ConfigError(f"cannot listen on {host}:{port}: {e.strerror}") from e
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as e:
        sock.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {e.strerror}") from e
    return sock


class HttpServer(uvicorn.Server):
    """Serves an ASGI app on a bound socket until `drain`."""

    def __init__(self, app: Any, settings: Settings) -> None:
        logging.getLogger("uvicorn").setLevel(logging.ERROR)  # what clients do wrong is in our metrics
        limits = ConnectionLimits(
            max_header_bytes=settings.max_header_bytes,
            max_headers=settings.max_headers,
            slow_client_s=settings.slow_client_s,
            stalled_client_s=settings.stalled_client_s,
            max_connections=settings.max_connections,
            max_connections_per_host=settings.max_connections_per_host,
        )
        super().__init__(
            uvicorn.Config(
                app,
                http=cast("type[asyncio.Protocol]", partial(Connection, limits)),
                ws="none",
                loop="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,  # headers say what they like; a client is who connects
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=cast("int", settings.keep_alive_s),
                timeout_graceful_shutdown=cast("int", settings.drain_timeout_s),
            )
        )
        self.listening = asyncio.Event()
        self._draining = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        for sock in sockets or ():
            # A client that vanished without a word, or takes nothing of a closed connection, ends here and not never.
            with suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)
        await super().startup(sockets)
        self.listening.set()

    async def main_loop(self) -> None:
        """Keep the date of the responses current until the drain; uvicorn's own loop wakes up ten times as often."""
        while not self._draining.is_set():
            await self.on_tick(0)
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._draining.wait()

    def drain(self) -> None:
        """Take no new connections and let `serve` return when what runs is answered. Idempotent."""
        self._draining.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the process."""
        yield
