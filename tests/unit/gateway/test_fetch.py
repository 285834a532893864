"""Nobody who controls a URL, a name or an answer gets a gateway to talk to what it should not."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from inferflux.errors import Unavailable
from services.gateway import fetch
from services.gateway.fetch import fetch_object, is_permitted

NEVER = (
    "0.0.0.0",  # noqa: S104 - refused
    "::",
    "224.0.0.1",
    "ff02::1",
    "169.254.169.254",
    "fe80::1",
    "::ffff:169.254.169.254",
    "fd00:ec2::254",
    "100.100.100.200",
    "192.0.0.192",
    "64:ff9b::a9fe:a9fe",
)
LOOPBACK = ("127.0.0.1", "127.255.0.1", "::1", "::ffff:127.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1")
PRIVATE = ("10.0.0.1", "172.16.0.1", "192.168.1.1", "fd12::1", "100.64.0.1", "::ffff:10.0.0.1", "2002:a00:1::")
PUBLIC = ("93.184.215.14", "2606:2800:21f:cb07::1", "64:ff9b::5db8:d70e")


@pytest.mark.parametrize("address", NEVER)
@pytest.mark.parametrize("network", ["public", "private", "loopback"])
def test_some_addresses_are_never_permitted(address, network):
    """Instance metadata and everything that is no host."""
    assert not is_permitted(ipaddress.ip_address(address), network)


@pytest.mark.parametrize(
    ("addresses", "networks"),
    [
        (LOOPBACK, {"loopback"}),
        (PRIVATE, {"private"}),
        (PUBLIC, {"public", "private"}),
    ],
)
def test_each_network_has_its_addresses(addresses, networks):
    """An IPv4 address inside another kind is judged, too."""
    for address in addresses:
        found = {n for n in ("public", "private", "loopback") if is_permitted(ipaddress.ip_address(address), n)}
        assert found == networks, address


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/keys",
        "https://127.0.0.1/keys",
        "https://localhost/keys",
        "https://2130706433/keys",
        "https://0x7f.1/keys",
        "https://017700000001/keys",
        "https://[::1]/keys",
        "https://[::ffff:127.0.0.1]/keys",
        "https://169.254.169.254/latest/meta-data/",
        "https://user@127.0.0.1/keys",
        "https://example.com@127.0.0.1/keys",
        "https://127.1/keys",
        "file:///etc/passwd",
        "gopher://127.0.0.1:6379/_",
        "ftp://127.0.0.1/",
        "//127.0.0.1/keys",
        "keys",
        "",
        "https://",
        "https://[::1/keys",
        "https://\u0661\u0662\u0667.0.0.1/",
    ],
)
async def test_public_means_public(url):
    """However an address of this machine is written."""
    with pytest.raises(Unavailable):
        await fetch_object(url, "public")


@asynccontextmanager
async def server(*answers: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Answer one connection after the other; gives the URL and the heads of the requests."""
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = answers[min(len(heads), len(answers) - 1)]
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer)
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", heads


def answer(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers.items()), "connection: close"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def test_an_object_is_fetched():
    """With the host's own name in the request."""
    async with server(answer(b'{"keys": []}')) as (url, heads):
        assert await fetch_object(url + "/keys?x=1", "loopback") == {"keys": []}
    assert heads[0].startswith(b"GET /keys?x=1 HTTP/1.1\r\n")
    assert f"host: {url.removeprefix('http://')}\r\n".encode() in heads[0].lower()


async def test_redirects_are_not_followed():
    """Not even to the same server."""
    async with server(answer(b"", "302 Found", Location="/other"), answer(b"{}")) as (url, heads):
        with pytest.raises(Unavailable, match="302"):
            await fetch_object(url, "loopback")
    assert len(heads) == 1


@pytest.mark.parametrize(
    "bad",
    [
        answer(b"{}", "404 Not Found"),
        answer(b"[]"),
        answer(b"no json"),
        answer(b'{"a":' + b"[" * 100_000),
        answer(b"x" * (fetch.MAX_BYTES + 1)),
        answer(b"\x1f\x8b\x08", **{"Content-Encoding": "gzip"}),
        b"not http\r\n\r\n",
        b"",
    ],
)
async def test_bad_answers_are_refused(bad):
    """Too large, no JSON, no object, or none at all."""
    async with server(bad) as (url, _):
        with pytest.raises(Unavailable, match="cannot fetch"):
            await fetch_object(url, "loopback")


async def test_the_name_is_resolved_once_and_each_of_its_addresses_counts(monkeypatch):
    """A name with one good and one bad address is refused; a second look-up would be a second chance."""
    loop, looked_up = asyncio.get_running_loop(), []

    async def getaddrinfo(host, port, **_):
        looked_up.append(host)
        return [(2, 1, 6, "", ("93.184.215.14", port)), (2, 1, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
    with pytest.raises(Unavailable, match="permitted network"):
        await fetch_object("https://rebind.example.com/keys", "public")
    assert looked_up == ["rebind.example.com"]


async def test_an_answer_that_does_not_end_is_given_up(monkeypatch):
    """After a few seconds, however busily it drips."""
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.2)

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not writer.is_closing() and not reader.at_eof():
            writer.write(b" ")
            await asyncio.sleep(0.02)
        writer.close()

    listening = await asyncio.start_server(drip, "127.0.0.1", 0)
    async with listening:
        with pytest.raises(Unavailable):
            await fetch_object(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/", "loopback")
