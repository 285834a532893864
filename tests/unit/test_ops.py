"""The ops port answers probes and scrapers, and nothing else."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from inferflux.errors import ConfigError
from inferflux.lifecycle import Lifecycle
from inferflux.ops import OpsServer
from inferflux.telemetry import metrics


@pytest.fixture
def life() -> Lifecycle:
    return Lifecycle("decode", "decode-0")


@pytest.fixture(params=["unix", "tcp"])
async def address(request: pytest.FixtureRequest, life: Lifecycle, tmp_path: Path) -> AsyncIterator[str]:
    wanted = f"unix:{tmp_path}/ops.sock" if request.param == "unix" else "127.0.0.1:0"
    server = OpsServer(wanted, life, metrics.render)
    yield await server.start()
    await server.close()
    await server.close()


async def ask(address: str, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send raw bytes; returns status, headers and body of the answer."""
    if address.startswith("unix:"):
        reader, writer = await asyncio.open_unix_connection(address[5:])
    else:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.split(": ") for line in lines), body


async def get(address: str, path: str) -> tuple[int, dict[str, str], bytes]:
    return await ask(address, f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())


async def test_live_while_the_loop_runs(address: str) -> None:
    """/livez says nothing but that the loop answers."""
    status, headers, body = await get(address, "/livez")

    assert (status, body, headers["content-length"]) == (200, b"ok\n", "3")


async def test_ready_follows_the_lifecycle(address: str, life: Lifecycle) -> None:
    """/readyz is 503 with a reason until ready, and again while draining."""
    status, _, body = await get(address, "/readyz?verbose")
    assert status == 503
    assert json.loads(body) == {
        "role": "decode",
        "id": "decode-0",
        "incarnation": life.incarnation,
        "state": "starting",
        "ready": False,
        "reason": "starting",
        "pid": os.getpid(),
    }

    life.set_ready()
    status, headers, body = await get(address, "/readyz")
    assert (status, headers["content-type"], json.loads(body)["ready"]) == (200, "application/json", True)

    life.begin_drain()
    status, _, body = await get(address, "/readyz")
    assert (status, json.loads(body)["state"]) == (503, "draining")


async def test_metrics_are_rendered(address: str) -> None:
    """/metrics is the exposition text of our registry."""
    status, headers, body = await get(address, "/metrics")

    assert status == 200
    assert headers["content-type"] == metrics.CONTENT_TYPE
    assert b"# TYPE inferflux_loop_lag_seconds histogram" in body


@pytest.mark.parametrize(
    ("request_bytes", "expected"),
    [
        (b"GET /secret HTTP/1.1\r\n\r\n", 404),
        (b"POST /livez HTTP/1.1\r\n\r\n", 405),
        (b"\x00\xff\r\n\r\n", 405),
    ],
)
async def test_everything_else_is_refused(address: str, request_bytes: bytes, expected: int) -> None:
    """Other paths, methods and noise get an error status."""
    status, _, _ = await ask(address, request_bytes)

    assert status == expected


async def test_endless_head_is_cut_off(address: str) -> None:
    """A head over the limit closes the connection instead of filling memory; the next one is served."""
    with pytest.raises((IndexError, ConnectionError)):
        await ask(address, b"GET /livez HTTP/1.1\r\nx: " + b"a" * 20_000)

    assert (await get(address, "/livez"))[0] == 200


async def test_peer_that_hangs_up_does_no_harm(address: str) -> None:
    """A connection closed before its request is complete is forgotten."""
    if not address.startswith("unix:"):
        return
    _, writer = await asyncio.open_unix_connection(address[5:])
    writer.write(b"GET /li")
    writer.close()
    await writer.wait_closed()

    assert (await get(address, "/livez"))[0] == 200


@pytest.mark.parametrize("bad", ["unix:/nonexistent/x.sock", "127.0.0.1:http", "nowhere"])
async def test_bad_addresses_are_configuration_errors(life: Lifecycle, bad: str) -> None:
    """An address that cannot be listened on is named."""
    server = OpsServer(bad, life, metrics.render)

    with pytest.raises(ConfigError, match="ops server cannot listen on"):
        await server.start()


async def test_without_the_token_there_is_no_more_than_probes_need(life: Lifecycle, tmp_path: Path) -> None:
    """Two statuses for all; metrics and reasons for who shows the token."""
    server = OpsServer(f"unix:{tmp_path}/ops.sock", life, metrics.render, "right")
    address = await server.start()
    try:
        assert (await ask(address, b"GET /livez HTTP/1.1\r\n\r\n"))[0] == 200
        code, _, body = await ask(address, b"GET /readyz HTTP/1.1\r\n\r\n")
        assert (code, json.loads(body)) == (503, {"ready": False})
        for header in (b"", b"authorization: Bearer wrong\r\n", b"authorization: Basic right\r\n"):
            code, _, body = await ask(address, b"GET /metrics HTTP/1.1\r\n" + header + b"\r\n")
            assert code == 401
            assert b"inferflux_" not in body
        token = b"host: a\r\nAuthorization: bearer right\r\n\r\n"
        assert b"inferflux_" in (await ask(address, b"GET /metrics HTTP/1.1\r\n" + token))[2]
        assert json.loads((await ask(address, b"GET /readyz HTTP/1.1\r\n" + token))[2])["id"] == "decode-0"
    finally:
        await server.close()
