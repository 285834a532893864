"""How ranks that are no children of their engine get its arena, writable: the descriptor over a unix socket.

Only while the engine starts, before the arena is sealed, and only to processes of the same user on the same host.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from inferflux.errors import ConfigError
from inferflux.kv.shm import peer_uid

TIMEOUT_S = 5.0


@contextlib.contextmanager
def offered(fd: int) -> Iterator[Path]:
    """Offer a descriptor inside the block; gives the socket where `take` gets it."""
    with tempfile.TemporaryDirectory(prefix="ifx-ranks-") as directory, _listening(Path(directory) / "arena") as peers:
        thread = threading.Thread(target=_serve, args=(peers, fd), name="arena-handout")
        thread.start()
        try:
            yield Path(directory) / "arena"
        finally:
            peers.shutdown(socket.SHUT_RDWR)  # wakes accept, which closing would not
            thread.join()


def take(path: Path) -> int:
    """Get the descriptor that is offered at `path`; the caller closes it. Raises ConfigError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.settimeout(TIMEOUT_S)
        try:
            peer.connect(str(path))
            _, fds, _, _ = socket.recv_fds(peer, 1, 1, socket.MSG_CMSG_CLOEXEC)
        except OSError as e:
            raise ConfigError(f"rank on {socket.gethostname()}: the arena is not on this host ({path}: {e})") from e
    if not fds:
        raise ConfigError(f"rank on {socket.gethostname()}: the arena's owner runs as another user")
    return fds[0]


def _listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen()
    return listener


def _serve(listener: socket.socket, fd: int) -> None:
    while True:
        try:
            peer, _ = listener.accept()
        except OSError:
            return
        with peer, contextlib.suppress(OSError):
            if peer_uid(peer) == os.getuid():
                socket.send_fds(peer, [b"a"], [fd])
