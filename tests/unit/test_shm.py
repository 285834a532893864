from __future__ import annotations

import asyncio
import mmap
import os
import signal
import socket
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import uvloop

from inferflux.errors import KvStale, KvUnreachable
from inferflux.kv import shm
from inferflux.kv.arena import Arena, ArenaReader
from inferflux.kv.digests import block_digest
from tests.support.children import forked

SLOT_BYTES = 5000
MIB = 1 << 20
TIMEOUT_S = 5.0
NOBODY = 65534


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ifx-") as directory:
        yield Path(directory) / "kv.sock"


@pytest.fixture
def arena() -> Iterator[Arena]:
    with closing(_arena(1)) as arena:
        yield arena


def _arena(fill: int) -> Arena:
    arena = Arena.create(MIB)
    arena.format(SLOT_BYTES)
    arena.seal()
    arena.slot(3)[:] = fill
    return arena


@asynccontextmanager
async def served(arena: Arena, path: Path, incarnation: str = "one") -> AsyncIterator[shm.ArenaServer]:
    server = shm.ArenaServer(arena, path, incarnation)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


async def fetch(path: Path, incarnation: str = "one", timeout_s: float = TIMEOUT_S) -> ArenaReader:
    return await asyncio.to_thread(shm.fetch, path, incarnation, timeout_s)


def serve_until_told(path: Path, incarnation: str, fill: int) -> Callable[[Connection], None]:
    """What a prefill worker does, for `forked`: a new arena, served until the pipe ends."""

    async def main(test: Connection) -> None:
        with closing(_arena(fill)) as arena:
            async with served(arena, path, incarnation):
                test.send(block_digest([arena.slot(3)]))
                with suppress(EOFError):
                    await asyncio.to_thread(test.recv)

    return lambda test: uvloop.run(main(test))


def _ask(path: Path, request: bytes) -> tuple[bytes, list[int]]:
    """Talk to a server without our client."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.settimeout(TIMEOUT_S)
        peer.connect(str(path))
        peer.send(request)
        answer, fds, _, _ = socket.recv_fds(peer, 512, 4)
    return answer, list(fds)


def _modes(directory: Path) -> dict[str, int]:
    return {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in directory.iterdir()}


def _open_to_all(path: Path) -> None:
    path.parent.chmod(0o755)
    path.chmod(0o666)


# -- two processes --------------------------------------------------------------------------------------------------


def test_a_reader_gets_the_blocks_of_another_process(path: Path) -> None:
    """The descriptor crosses the socket once; from there on blocks are read in place, and never written."""
    with forked(serve_until_told(path, "one", 7)) as worker:
        digest = worker.recv()
        with closing(shm.fetch(path, "one", TIMEOUT_S)) as reader:
            assert block_digest([reader.slot(3)]) == digest
            assert not reader.slot(3).flags.writeable
    assert not path.exists()


def test_the_descriptor_that_a_reader_receives_cannot_be_mapped_for_writing(path: Path) -> None:
    """The seal travels with the memory, so a reader that ignores our code gets no further."""
    with forked(serve_until_told(path, "one", 7)) as worker:
        worker.recv()
        _, (fd,) = _ask(path, b"inferflux-arena/1 one")
        try:
            with pytest.raises(PermissionError):
                mmap.mmap(fd, 0)
            with pytest.raises(PermissionError):
                os.pwrite(fd, b"x", 0)
        finally:
            os.close(fd)


def test_a_reader_outlives_a_killed_producer(path: Path) -> None:
    """Kill -9 of the prefill worker after the hand-over: the blocks are still there, byte for byte."""

    def worker(test: Connection) -> None:
        pid = os.fork()
        if pid == 0:
            serve_until_told(path, "one", 9)(test)
        test.send(pid)
        _, status = os.waitpid(pid, 0)
        test.send(os.waitstatus_to_exitcode(status))

    with forked(worker) as child:
        messages = [child.recv(), child.recv()]
        pid = next(m for m in messages if isinstance(m, int))
        digest = next(m for m in messages if isinstance(m, bytes))
        with closing(shm.fetch(path, "one", TIMEOUT_S)) as reader:
            os.kill(pid, signal.SIGKILL)
            assert child.recv() == -signal.SIGKILL

            assert block_digest([reader.slot(3)]) == digest
            with pytest.raises(KvUnreachable):
                shm.fetch(path, "one", TIMEOUT_S)


def test_a_restarted_worker_is_another_incarnation(path: Path) -> None:
    """Its arena is new memory: tickets of the earlier start are stale, the same path serves the new start."""
    with forked(serve_until_told(path, "one", 1)) as worker:
        worker.recv()
    with forked(serve_until_told(path, "two", 2)) as worker:
        digest = worker.recv()

        with pytest.raises(KvStale):
            shm.fetch(path, "one", TIMEOUT_S)
        with closing(shm.fetch(path, "two", TIMEOUT_S)) as reader:
            assert block_digest([reader.slot(3)]) == digest


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
async def test_another_user_gets_nothing(path: Path, arena: Arena) -> None:
    """The kernel says who connects; file modes are only the first line."""

    def stranger(test: Connection) -> None:
        test.recv()
        os.setuid(NOBODY)
        with pytest.raises(KvUnreachable):
            shm.fetch(path, "one", TIMEOUT_S)
        test.send("locked out")
        test.recv()
        try:
            test.send(_ask(path, b"inferflux-arena/1 one"))
        except OSError:  # the server hung up before it read
            test.send((b"", []))

    with forked(stranger) as child:
        async with served(arena, path):
            child.send("go")
            assert await asyncio.to_thread(child.recv) == "locked out"
            _open_to_all(path)
            child.send("go")
            assert await asyncio.to_thread(child.recv) == (b"", [])


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_users_server_is_not_believed(path: Path) -> None:
    """Who takes over a socket's path must not feed us blocks."""

    def impostor(test: Connection) -> None:
        os.setuid(NOBODY)
        serve_until_told(path, "one", 6)(test)

    path.parent.chmod(0o777)
    with forked(impostor) as child:
        child.recv()
        with pytest.raises(KvUnreachable, match="another user"):
            shm.fetch(path, "one", TIMEOUT_S)


# -- one process ----------------------------------------------------------------------------------------------------


async def test_only_the_owner_may_open_the_socket(path: Path, arena: Arena) -> None:
    """At its path the socket never has other modes, not even while it starts."""
    async with served(arena, path):
        assert _modes(path.parent) == {"kv.sock": 0o600}


async def test_many_readers_are_served_at_once(path: Path, arena: Arena) -> None:
    """Decode workers all come after a restart of their prefill worker."""
    async with served(arena, path):
        readers = await asyncio.gather(*(fetch(path) for _ in range(20)))

        assert all((reader.slot(3) == 1).all() for reader in readers)
        for reader in readers:
            reader.close()


async def test_a_dead_socket_is_replaced(path: Path, arena: Arena) -> None:
    """A killed worker leaves its socket file; its successor starts all the same."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(path))
    with pytest.raises(KvUnreachable):
        await fetch(path)

    async with served(arena, path):
        (await fetch(path)).close()


async def test_closing_leaves_the_socket_of_a_successor(path: Path, arena: Arena) -> None:
    """An old process that drains slowly must not cut off the new one."""
    with closing(_arena(2)) as newer:
        async with served(arena, path) as old, served(newer, path, "two"):
            await old.close()
            with closing(await fetch(path, "two")) as reader:
                assert (reader.slot(3) == 2).all()


async def test_closing_twice_is_fine(path: Path, arena: Arena) -> None:
    """Exit paths may meet."""
    async with served(arena, path) as server:
        await server.close()
        assert _modes(path.parent) == {}


async def test_only_a_sealed_arena_is_served(path: Path) -> None:
    """Readers would refuse it anyway; the worker should hear of it first."""
    with closing(Arena.create(MIB)) as arena, pytest.raises(ValueError, match="sealed"):
        await shm.ArenaServer(arena, path, "one").start()


@pytest.mark.parametrize("request_", [b"x", b"GET / HTTP/1.1\r\n\r\n", b"inferflux-arena/1 on", b"\0" * 5000])
async def test_a_stranger_at_the_socket_gets_no_descriptor(path: Path, arena: Arena, request_: bytes) -> None:
    """Only who names the incarnation gets it, and the server survives the rest."""
    async with served(arena, path):
        assert await asyncio.to_thread(_ask, path, request_) == (b"inferflux-arena/1 one", [])
        (await fetch(path)).close()


async def test_a_silent_reader_is_dropped_and_disturbs_nobody(path: Path, arena: Arena) -> None:
    """Each connection has its own handshake deadline."""
    async with served(arena, path):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
            silent.settimeout(TIMEOUT_S)
            silent.connect(str(path))
            (await fetch(path)).close()

            assert await asyncio.to_thread(silent.recv, 1) == b""


async def test_a_silent_worker_costs_no_more_than_the_timeout(path: Path) -> None:
    """A stopped producer must not hang its readers' threads."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind(str(path))
        silent.listen()
        start = time.monotonic()
        with pytest.raises(KvUnreachable, match="timed out"):
            await fetch(path, timeout_s=0.2)

        assert time.monotonic() - start < 2


async def test_nobody_at_the_path_is_unreachable(path: Path) -> None:
    """A worker on another host, or none."""
    for nowhere in (path, Path("/nonexistent/kv.sock"), Path("/tmp/" + "x" * 200)):
        with pytest.raises(KvUnreachable):
            await fetch(nowhere)


async def test_a_descriptor_that_is_no_arena_is_refused_and_closed(path: Path) -> None:
    """What arrives is checked before it is mapped, and never leaks."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as fake:
        fd = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        fake.bind(str(path))
        fake.listen()
        fetching = asyncio.create_task(fetch(path))
        peer, _ = await asyncio.to_thread(fake.accept)
        with peer:
            peer.recv(512)
            socket.send_fds(peer, [b"inferflux-arena/1 one"], [fd])
            os.close(fd)
            with pytest.raises(KvUnreachable, match="sealed"):
                await fetching


def test_a_host_has_one_identity() -> None:
    """The boot id: the same for all processes, another one after a reboot."""
    assert shm.host_id() == shm.host_id()
    assert len(shm.host_id()) == 36
