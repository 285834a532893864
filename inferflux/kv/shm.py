"""How a worker on the same host gets another worker's arena: a sealed descriptor over a unix socket, once.

One packet each way (SOCK_SEQPACKET keeps their borders): the reader names the incarnation that its ticket names, the
server answers with its own and, when they are equal, with the descriptor. Both sides let the kernel tell them the
other's user and talk only to their own. A restarted worker is a new incarnation, so nobody reads new memory with an old
ticket.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import time
from collections.abc import Coroutine
from pathlib import Path

from inferflux.errors import KvStale, KvUnreachable
from inferflux.kv.arena import Arena, ArenaReader

PROTOCOL = "inferflux-arena/1"
MAX_PACKET = 512
HANDSHAKE_S = 1.0
ACCEPT_RETRY_S = 0.1
UCRED = struct.Struct("3i")  # pid, uid, gid: socket(7)


def host_id() -> str:
    """Identity of this boot of this host; processes with equal ids may share memory."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class ArenaServer:
    """Hands an arena's descriptor to readers of the same user. One event loop; `start` once, `close` is idempotent."""

    def __init__(self, arena: Arena, socket_path: Path | str, incarnation: str) -> None:
        self._arena = arena
        self._path = Path(socket_path)
        self._incarnation = incarnation
        self._listener: socket.socket | None = None
        self._inode = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen at the path, replacing what an earlier start left there. The arena must be sealed and formatted."""
        if not (self._arena.is_sealed and self._arena.is_formatted):
            raise ValueError("only a formatted and sealed arena may be served")
        self._listener = _listen(self._path)
        self._inode = self._path.stat().st_ino
        self._spawn(self._accept(self._listener))

    async def close(self) -> None:
        """Stop listening; readers keep what they have."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            self._unlink()

    def _unlink(self) -> None:
        """Remove our socket, but not that of a successor at the same path."""
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()

    def _spawn(self, coro: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(coro)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                peer, _ = await loop.sock_accept(listener)
            except OSError:  # out of descriptors: that passes, readers compute meanwhile
                await asyncio.sleep(ACCEPT_RETRY_S)
            else:
                self._spawn(self._serve(peer))

    async def _serve(self, peer: socket.socket) -> None:
        with peer, contextlib.suppress(OSError, TimeoutError):
            if peer_uid(peer) != os.getuid():
                return
            async with asyncio.timeout(HANDSHAKE_S):
                request = await asyncio.get_running_loop().sock_recv(peer, MAX_PACKET)
            self._answer(peer, request)

    def _answer(self, peer: socket.socket, request: bytes) -> None:
        answer = _packet(self._incarnation)
        fds = [self._arena.fd] if request == answer else []
        # Never blocks: the first packet on a fresh socket always fits its buffer.
        socket.send_fds(peer, [answer], fds)


def fetch(socket_path: Path | str, incarnation: str, timeout_s: float, *, populate: bool = True) -> ArenaReader:
    """Get the arena of the worker that listens at `socket_path`. Blocks: call it in a thread, never on a loop.

    `populate`: see ArenaReader.open. Raises KvUnreachable when nobody of our user answers in time, KvStale when it is
    another incarnation.
    """
    answer, fds = _ask(socket_path, incarnation, timeout_s)
    return _open(answer, fds, incarnation, populate=populate)


def identify(socket_path: Path | str, timeout_s: float) -> str:
    """Ask which incarnation listens at `socket_path`. Blocks. Raises KvUnreachable when nobody of our user does."""
    answer, fds = _ask(socket_path, "", timeout_s)
    for fd in fds:
        os.close(fd)
    protocol, _, incarnation = answer.decode(errors="replace").partition(" ")
    if protocol != PROTOCOL or not incarnation:
        raise KvUnreachable(f"no arena at {socket_path}: not its protocol")
    return incarnation


def _ask(socket_path: Path | str, incarnation: str, timeout_s: float) -> tuple[bytes, list[int]]:
    """Name an incarnation; returns the server's answer and, when it is the one, the descriptor."""
    deadline = time.monotonic() + timeout_s
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
            peer.settimeout(timeout_s)
            peer.connect(str(socket_path))
            _require_same_user(peer)
            peer.send(_packet(incarnation))
            peer.settimeout(max(deadline - time.monotonic(), 1e-3))
            answer, fds, _, _ = socket.recv_fds(peer, MAX_PACKET, 1, socket.MSG_CMSG_CLOEXEC)
    except OSError as e:
        raise KvUnreachable(f"no arena at {socket_path}: {e}") from e
    return answer, fds


def is_served(socket_path: Path | str, timeout_s: float) -> bool:
    """Whether somebody listens at `socket_path` whom we may connect to. Blocks."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.settimeout(timeout_s)
        try:
            peer.connect(str(socket_path))
            _require_same_user(peer)
        except OSError:
            return False
        return True


def _open(answer: bytes, fds: list[int], incarnation: str, *, populate: bool) -> ArenaReader:
    try:
        if answer and answer != _packet(incarnation):
            raise KvStale(f"the arena of incarnation {incarnation} is gone")
        if not fds:
            raise KvUnreachable("the arena's owner refused")
        return ArenaReader.open(fds[0], populate=populate)
    finally:
        for fd in fds:
            os.close(fd)


def peer_uid(peer: socket.socket) -> int:
    """User of the process at the other end, as the kernel saw it when it connected or listened."""
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
    return int(UCRED.unpack(credentials)[1])


def _require_same_user(peer: socket.socket) -> None:
    if peer_uid(peer) != os.getuid():
        raise PermissionError("the peer runs as another user")


def _packet(incarnation: str) -> bytes:
    return f"{PROTOCOL} {incarnation}".encode()


def _listen(path: Path) -> socket.socket:
    """Bind aside, restrict, then rename: at `path` there is never a socket that others may open, nor none."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        listener.bind(str(aside))
        aside.chmod(0o600)
        listener.listen()
        aside.rename(path)
    except BaseException:
        listener.close()
        raise
    return listener
