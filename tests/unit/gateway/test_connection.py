"""The HTTP server on a real socket, talked to byte by byte."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from inferflux.errors import ConfigError
from services.gateway.asgi import WRITE_NOW
from services.gateway.connection import LINGER_S
from services.gateway.server import HttpServer, bind
from services.gateway.settings import Settings

LIMITS = {
    "max_header_bytes": 1000,
    "max_headers": 10,
    "slow_client_s": 0.3,
    "stalled_client_s": 0.3,
    "max_connections": 6,
    "max_connections_per_host": 5,
    "keep_alive_s": 0.6,
}
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


class App:
    """Says what it read; `path` decides how."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.is_stalled = False
        self.num_gone = 0
        self.go_on = asyncio.Event()

    async def __call__(self, scope, receive, send) -> None:
        await getattr(self, scope["path"].strip("/") or "echo")(scope, receive, send)

    async def echo(self, scope, receive, send) -> None:
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.num_gone += 1
                return
            body += message["body"]
            if not message["more_body"]:
                break
        self.bodies.append(body)
        await self._answer(send, b"read %d" % len(body))

    async def refuse(self, scope, receive, send) -> None:
        """Answer without reading."""
        await self._answer(send, b"no", 413)

    async def wait(self, scope, receive, send) -> None:
        await self.go_on.wait()
        await self._answer(send, b"late")

    async def flood(self, scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        write_now = scope["extensions"][WRITE_NOW]
        while write_now(b"x" * 50_000):
            await asyncio.sleep(0)
        self.is_stalled = True
        while (await receive())["type"] != "http.disconnect":
            pass
        self.num_gone += 1

    async def both(self, scope, receive, send) -> None:
        """Chunks by the standard's way and by ours, one after the other."""
        write_now = scope["extensions"][WRITE_NOW]
        assert not write_now(b"too early")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one ", "more_body": True})
        assert write_now(b"two ")
        await send({"type": "http.response.body", "body": b"three ", "more_body": True})
        assert write_now(b"four")
        await send({"type": "http.response.body", "body": b""})
        assert not write_now(b"too late")

    async def _answer(self, send, body: bytes, status: int = 200) -> None:
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class Wire:
    """One client connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> tuple[int, bytes]:
        """Read one response with a length."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        return int(head.split()[1]), await self.reader.readexactly(length)

    async def refusal(self) -> tuple[int, str]:
        """Read an error of the server itself, after which the connection ends."""
        status, body = await self.answer()
        assert await self.is_closed()
        return status, json.loads(body)["error"]["code"]

    async def is_closed(self) -> bool:
        """Wait for the server to close without a word."""
        async with asyncio.timeout(5):
            try:
                return await self.reader.read() == b""
            except ConnectionError:
                return True


@asynccontextmanager
async def server(**limits) -> AsyncIterator[tuple[App, socket.socket]]:
    """Run the server until the block ends."""
    app, sock = App(), bind("127.0.0.1", 0)
    settings = Settings(policy_address="p", registry_address="r", drain_timeout_s=2, **(LIMITS | limits))
    http = HttpServer(app, settings)
    task = asyncio.create_task(http.serve(sockets=[sock]))
    await http.listening.wait()
    try:
        yield app, sock
    finally:
        app.go_on.set()
        http.drain()
        await task


@asynccontextmanager
async def wire(sock: socket.socket) -> AsyncIterator[Wire]:
    """Connect."""
    reader, writer = await asyncio.open_connection("127.0.0.1", sock.getsockname()[1])
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()


async def test_requests_follow_each_other_on_a_connection():
    """With bodies of any size, in any pieces, and pipelined."""
    async with server() as (app, sock), wire(sock) as client:
        client.send(GET)
        assert await client.answer() == (200, b"read 0")
        big = b"x" * 200_000
        client.send(b"POST / HTTP/1.1\r\ncontent-length: 200000\r\n\r\n" + big + GET)
        assert await client.answer() == (200, b"read 200000")
        assert await client.answer() == (200, b"read 0")
        client.send(b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await asyncio.sleep(0.01)
        client.send(b"2\r\nde\r\n0\r\n\r\n")
        assert await client.answer() == (200, b"read 5")
        assert app.bodies[-1] == b"abcde"


async def test_chunks_written_past_the_server_are_chunks_like_others():
    """In order, and only while a response is being streamed."""
    async with server() as (_, sock), wire(sock) as client:
        client.send(b"GET /both HTTP/1.1\r\nhost: x\r\n\r\n")
        text = await client.reader.readuntil(b"0\r\n\r\n")

        assert text.endswith(b"4\r\none \r\n4\r\ntwo \r\n6\r\nthree \r\n4\r\nfour\r\n0\r\n\r\n")
        client.send(GET)
        assert await client.answer() == (200, b"read 0")


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nx: " + b"y" * 1100 + b"\r\n\r\n",
        b"GET /" + b"y" * 1100 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"h%d: v\r\n" % n for n in range(11)) + b"\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"h%d: %b\r\n" % (n, b"v" * 200) for n in range(6)) + b"\r\n",
    ],
)
async def test_large_heads_are_refused(head):
    """One large header, a large path, many headers, or all of them together."""
    async with server() as (app, sock), wire(sock) as client:
        client.send(head)

        assert await client.refusal() == (431, "headers_too_large")
        assert not app.bodies


async def test_a_header_that_never_ends_is_refused_while_it_comes():
    """It is not kept in memory until it is complete."""
    async with server() as (_, sock), wire(sock) as client:
        client.send(b"GET / HTTP/1.1\r\nx: y")
        await asyncio.sleep(0.01)
        for _ in range(4):
            client.send(b"y" * 400)
            await asyncio.sleep(0.01)

        assert await client.refusal() == (431, "headers_too_large")


async def test_a_slow_head_is_refused():
    """However steadily it drips."""
    async with server() as (_, sock), wire(sock) as client:
        answer = asyncio.create_task(client.refusal())
        for byte in GET[:-1]:
            if answer.done():
                break
            client.send(bytes([byte]))
            await asyncio.sleep(0.03)

        assert await answer == (408, "request_timeout")


async def test_a_silent_connection_is_closed():
    """Before its first request and after its last."""
    async with server() as (_, sock), wire(sock) as silent, wire(sock) as idle:
        idle.send(GET)
        assert await idle.answer() == (200, b"read 0")
        async with asyncio.timeout(3):
            assert await silent.is_closed()
            assert await idle.is_closed()


async def test_newlines_do_not_keep_a_connection():
    """They are no request, so they must not count as life."""
    async with server() as (_, sock), wire(sock) as client:
        client.send(GET)
        assert await client.answer() == (200, b"read 0")
        closed = asyncio.create_task(client.is_closed())
        for _ in range(30):
            if closed.done():
                break
            client.send(b"\r\n")
            await asyncio.sleep(0.1)

        assert closed.done()


async def test_newlines_after_a_request_do_not_end_it():
    """Old clients send some."""
    async with server() as (app, sock), wire(sock) as client:
        client.send(b"GET /wait HTTP/1.1\r\nhost: x\r\n\r\n\r\n")
        await asyncio.sleep(0.5)
        app.go_on.set()

        assert await client.answer() == (200, b"late")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS hello
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nname : value\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: a\x00b\r\n\r\n",
        b"GET /\x80 HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: 1\r\n folded\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 1e3\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        # Smuggling: two readers would see two different requests.
        b"POST / HTTP/1.1\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        b"POST / HTTP/1.1\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\ntransfer-encoding: xchunked\r\n\r\n",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\ntransfer-encoding : chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n\r\n",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n-1\r\n\r\n",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n\r\n",
    ],
)
async def test_what_is_no_proper_http_never_becomes_a_request(request_bytes):
    """The connection ends, if possible with a 400."""
    async with server() as (app, sock), wire(sock) as client:
        client.send(request_bytes)
        answer = await client.reader.read()

        assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
        assert not app.bodies


async def test_bytes_after_a_bad_request_are_not_read():
    """A smuggled second request dies with the first."""
    async with server() as (app, sock), wire(sock) as client:
        client.send(b"POST / HTTP/1.1\r\ncontent-length: 0\r\ncontent-length: 5\r\n\r\n" + GET)
        answer = await client.reader.read()

        assert answer.startswith(b"HTTP/1.1 400 ")
        assert answer.endswith(b"}")
        assert not app.bodies


async def test_a_refused_client_gets_its_answer_before_the_end():
    """One that is still sending when it is refused can read why."""
    async with server() as (_, sock), wire(sock) as client:
        client.send(b"POST /refuse HTTP/1.1\r\ncontent-length: 3000000\r\n\r\n")
        for _ in range(30):
            client.send(b"x" * 100_000)
            await client.writer.drain()

        assert await client.answer() == (413, b"no")
        client.send(GET)
        assert await client.answer() == (200, b"read 0")


async def test_a_pipelined_request_may_take_its_time():
    """The end of the response before it starts no countdown for its body."""
    async with server(slow_client_s=60) as (_, sock), wire(sock) as client:
        client.send(GET + b"POST / HTTP/1.1\r\ncontent-length: 4\r\n\r\nab")
        assert await client.answer() == (200, b"read 0")
        await asyncio.sleep(LINGER_S + 0.2)
        client.send(b"cd")

        assert await client.answer() == (200, b"read 4")


async def test_a_refused_client_that_goes_on_and_on_is_cut():
    """Reading what nobody wants has an end."""
    async with server() as (_, sock), wire(sock) as client:
        client.send(b"POST /refuse HTTP/1.1\r\ncontent-length: 9000000000\r\n\r\n")

        async def go_on() -> None:
            for _ in range(1000):
                client.send(b"x" * 1_000_000)
                await client.writer.drain()

        with pytest.raises(ConnectionError):
            await go_on()


async def test_connections_are_limited_by_client():
    """The one too many is told, and a free place can be taken again."""
    async with AsyncExitStack() as stack:
        _, sock = await stack.enter_async_context(server())
        *rest, last, extra = [await stack.enter_async_context(wire(sock)) for _ in range(6)]
        assert await extra.refusal() == (503, "unavailable")
        rest[0].send(GET)
        assert await rest[0].answer() == (200, b"read 0")
        last.writer.close()
        await last.writer.wait_closed()
        await asyncio.sleep(0.01)
        other = await stack.enter_async_context(wire(sock))
        other.send(GET)
        assert await other.answer() == (200, b"read 0")


async def test_a_client_that_takes_nothing_is_cut():
    """What it does not read must not be kept for ever."""
    async with server() as (app, sock), wire(sock) as client:
        client.writer.transport.pause_reading()
        client.send(b"GET /flood HTTP/1.1\r\nhost: x\r\n\r\n")
        async with asyncio.timeout(5):
            while not app.num_gone:
                await asyncio.sleep(0.01)

        assert app.is_stalled


async def test_a_client_that_leaves_in_its_body_is_noticed():
    """At once."""
    async with server(slow_client_s=60) as (app, sock):
        async with wire(sock) as client:
            client.send(b"POST / HTTP/1.1\r\ncontent-length: 10\r\n\r\nabc")
            await asyncio.sleep(0.05)
        async with asyncio.timeout(1):
            while not app.num_gone:
                await asyncio.sleep(0.01)


async def test_a_port_in_use_is_a_clear_error():
    """Before anything else has started."""
    async with server() as (_, sock):
        port = sock.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use"):
            bind("127.0.0.1", port)


def test_a_host_that_is_not_here_is_a_clear_error():
    """Neither a name nobody knows nor an address of another machine."""
    with pytest.raises(ConfigError, match="cannot listen on"):
        bind("192.0.2.1", 0)
