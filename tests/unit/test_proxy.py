"""The fault proxy itself: a test that relies on a cut must know that it was one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.support.proxy import Proxy

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def echo() -> AsyncIterator[tuple[Proxy, Streams]]:
    """A client of an echo server behind a proxy, over TCP."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1000):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    proxy = Proxy("127.0.0.1:0", f"{host}:{port}")
    host, _, port = (await proxy.start()).rpartition(":")
    streams = await asyncio.open_connection(host, int(port))
    try:
        yield proxy, streams
    finally:
        streams[1].close()
        await proxy.close()
        server.close()


async def say(streams: Streams, text: bytes, timeout_s: float = 5.0) -> bytes:
    streams[1].write(text)
    async with asyncio.timeout(timeout_s):
        return await streams[0].readexactly(len(text))


async def test_it_passes_everything_on_and_counts_it() -> None:
    async with echo() as (proxy, streams):
        assert await say(streams, b"hello") == b"hello"
        assert proxy.bytes_passed == {"up": 5, "down": 5}
        assert proxy.num_connections == 1


@pytest.mark.parametrize("direction", ["up", "down"])
async def test_what_is_cut_is_held_and_arrives_when_it_heals(direction: str) -> None:
    async with echo() as (proxy, streams):
        await say(streams, b"one")
        proxy.cut(direction)  # type: ignore[arg-type]
        with pytest.raises(TimeoutError):
            await say(streams, b"two", 0.2)
        assert proxy.bytes_held[direction] == 3  # type: ignore[index]

        proxy.heal()

        async with asyncio.timeout(5):
            assert await streams[0].readexactly(3) == b"two"


async def test_a_delay_is_one() -> None:
    async with echo() as (proxy, streams):
        loop = asyncio.get_running_loop()
        proxy.delay(0.1, "up", "down")
        began_at = loop.time()
        assert await say(streams, b"late") == b"late"
        assert loop.time() - began_at >= 0.2


async def test_a_reset_breaks_the_connection() -> None:
    async with echo() as (proxy, streams):
        await say(streams, b"one")
        proxy.reset()
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await say(streams, b"two")


async def test_a_half_close_ends_one_direction_only() -> None:
    async with echo() as (proxy, streams):
        await say(streams, b"one")
        proxy.half_close("down")
        async with asyncio.timeout(5):
            assert await streams[0].read() == b""
        streams[1].write(b"still heard")
        await streams[1].drain()
        async with asyncio.timeout(5):
            while proxy.bytes_passed["up"] < 14:
                await asyncio.sleep(0.01)


async def test_a_limit_cuts_amid_a_message() -> None:
    async with echo() as (proxy, streams):
        proxy.limit(4, "up")
        streams[1].write(b"hello")
        async with asyncio.timeout(5):
            data = await streams[0].read(100)
        assert proxy.bytes_passed["up"] == 4
        assert b"hello".startswith(data)
