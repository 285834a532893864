from __future__ import annotations

import asyncio
import socket
import stat
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from inferflux.cli.control import ControlServer, NotRunning, ask


@pytest.fixture
async def path() -> AsyncIterator[Path]:
    """A control server that echoes, and refuses what has no `name`."""

    async def answer(request):
        return {"echo": request["name"]}

    with tempfile.TemporaryDirectory(prefix="ifx-", dir="/tmp") as folder:
        server = ControlServer(Path(folder) / "s", answer)
        await server.start()
        yield Path(folder) / "s"
        await server.close()


async def test_a_question_is_answered(path):
    """One line asks and one line answers; only the owner may ask."""
    assert await asyncio.to_thread(ask, path, "x", name="y") == {"echo": "y"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_a_bad_question_is_refused_and_the_server_lives(path):
    """What makes no sense is answered with an error, and the next one is answered again."""
    with pytest.raises(ValueError, match="name"):
        await asyncio.to_thread(ask, path, "x")

    def send_garbage():
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(b"\xff{\n")
            return connection.makefile().readline()

    assert '"ok": false' in await asyncio.to_thread(send_garbage)
    assert await asyncio.to_thread(ask, path, "x", name="z") == {"echo": "z"}


async def test_a_stale_socket_is_replaced(path):
    """A socket that a killed supervisor left behind is in nobody's way."""
    stale = path.with_name("stale")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))

    async def answer(_request):
        return {}

    server = ControlServer(stale, answer)
    await server.start()
    assert await asyncio.to_thread(ask, stale, "x") == {}
    await server.close()


def test_nobody_there_is_not_running(tmp_path):
    """No socket, and a socket without a process behind it, are the same."""
    with pytest.raises(NotRunning):
        ask(tmp_path / "none", "status")
