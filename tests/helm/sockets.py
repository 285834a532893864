"""Which TCP ports the processes of a fake cluster listen on."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

LISTEN = "0A"
Endpoint = tuple[str, int]


def listening(pids: Iterable[int]) -> set[Endpoint]:
    """Return the addresses and ports that these processes listen on, as the kernel has them."""
    owned = {inode for pid in pids for inode in _inodes(pid)}
    return {endpoint for inode, endpoint in _listeners() if inode in owned}


def _inodes(pid: int) -> Iterator[str]:
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                target = str(link.readlink())
                if target.startswith("socket:["):
                    yield target[8:-1]


def _listeners() -> Iterator[tuple[str, Endpoint]]:
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN:
                address, _, port = fields[1].partition(":")
                yield fields[9], (_address(address), int(port, 16))


def _address(text: str) -> str:
    """Read an address as /proc has it: words in the machine's byte order."""
    raw = b"".join(struct.pack("=I", int(text[i : i + 8], 16)) for i in range(0, len(text), 8))
    text = socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)
    return text.removeprefix("::ffff:")  # how gRPC binds an address of version 4
