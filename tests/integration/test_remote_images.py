"""Images by address: only of hosts that are listed, only once a request may run, and never by a worker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.support.fake_cluster import JSON_HEAD, FakeClient, FakeDecode, Job, end, fake_cluster, running_gateway
from tests.support.pictures import data_url, picture

HOSTS = {"image_hosts": ("127.0.0.1",), "image_network": "loopback", "max_image_pixels": 64 * 64}
FILES = {"/a.png": picture(1), "/b.webp": picture(2, kind="WEBP"), "/large.png": picture(3, 65, 64), "/text": b"hello"}


class Site:
    """A host of images on this machine."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.port = 0

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
        self.asked.append(path)
        body = FILES.get(path)
        status = b"200 OK" if body is not None else b"302 Found\r\nlocation: /a.png"
        writer.write(b"HTTP/1.1 %b\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body or b""), body or b""))
        await writer.drain()
        writer.close()


async def answer(job: Job) -> None:
    job.emit(head=JSON_HEAD, data=b"{}", end=end())


@asynccontextmanager
async def site_and_gateway(**settings: Any) -> AsyncIterator[tuple[Site, FakeDecode, FakeClient]]:
    site = Site()
    server = await asyncio.start_server(site.serve, "127.0.0.1", 0)
    site.port = server.sockets[0].getsockname()[1]
    async with server, fake_cluster() as cluster:
        decode = await cluster.add_decode()
        decode.script = answer
        async with running_gateway(cluster, **settings) as gateway:
            await gateway.ready()
            yield site, decode, gateway


def message(*urls: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}} for url in urls]}]


async def test_images_of_listed_hosts_come_to_workers_inside_the_body() -> None:
    """Each address is asked once; what else the body says stays as it was."""
    async with site_and_gateway(**HOSTS) as (site, decode, gateway):
        urls = [site.url("/a.png"), site.url("/b.webp"), site.url("/a.png"), data_url(FILES["/a.png"])]
        response = await gateway.chat(messages=message(*urls), metadata={"image_url": site.url("/a.png")})

        assert response.status_code == 200, response.text
        body = json.loads(decode.jobs[0].start.call.body)
        first, second = data_url(FILES["/a.png"]), data_url(FILES["/b.webp"], "webp")
        assert body["messages"] == message(first, second, first, first)
        assert body["metadata"] == {"image_url": site.url("/a.png")}
        assert sorted(site.asked) == ["/a.png", "/b.webp"]


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("/large.png", "65 x 64 = 4160 pixels, the limit is 4096"),
        ("/text", "not an image of a known format"),
        ("/moved.png", "answered 302"),
    ],
)
async def test_what_cannot_be_fetched_or_is_too_large_is_refused(path: str, what: str) -> None:
    """By a clear 400; redirects are not followed; no worker hears of it."""
    async with site_and_gateway(**HOSTS) as (site, decode, gateway):
        response = await gateway.chat(messages=message(site.url("/a.png"), site.url(path)))

        assert response.status_code == 400
        assert what in response.json()["error"]["message"]
        assert not decode.jobs


async def test_hosts_that_are_not_listed_are_never_asked() -> None:
    """Nor is any by default, nor one that lies elsewhere than it should."""
    async with site_and_gateway() as (site, decode, gateway):
        assert (await gateway.chat(messages=message(site.url("/a.png")))).status_code == 400
        assert not site.asked
    for settings in ({**HOSTS, "image_hosts": ("example.com",)}, {**HOSTS, "image_network": "public"}):
        async with site_and_gateway(**settings) as (site, decode, gateway):
            userinfo = site.url("/a.png").replace("://", "://example.com@")
            for url in (site.url("/a.png"), userinfo):
                assert (await gateway.chat(messages=message(url))).status_code == 400
            assert not site.asked
            assert not decode.jobs
