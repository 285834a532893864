"""Audit records on this gateway's disk that the policy service has not got yet: one file of JSON lines."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from inferflux.paths import private_dir
from inferflux.telemetry import metrics

BATCH_BYTES = 1 << 20


class Spool:
    """A queue on disk. Its methods block: call them in a thread, one at a time. All of them raise OSError."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._taken = 0
        self.num_bytes = path.stat().st_size if path.exists() else 0
        metrics.AUDIT_SPOOL_BYTES.set(self.num_bytes)

    @property
    def is_empty(self) -> bool:
        return self.num_bytes == 0

    def put(self, records: list[bytes]) -> None:
        """Append records: they are on disk when this returns, or nothing of them is."""
        data = b"".join(record + b"\n" for record in records)
        if self.num_bytes + len(data) > self._max_bytes:
            raise OSError(errno.ENOSPC, f"the spool would have more than {self._max_bytes} bytes")
        private_dir(self._path.parent)
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, self.num_bytes)  # without what a failed write, or a crash, has left
            _write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        self._resize(self.num_bytes + len(data))

    def peek(self) -> list[bytes]:
        """Read the next records, at least one if there is any; `drop` then takes them out."""
        with self._path.open("rb") as file:
            file.seek(self._taken)
            data = file.read(BATCH_BYTES)
            data += b"" if data.endswith(b"\n") else file.readline()
        return data.split(b"\n")[:-1]

    def drop(self, records: list[bytes]) -> None:
        """Take out what `peek` has read. The file shrinks when all is taken: until then a crash repeats records."""
        self._taken += sum(len(record) + 1 for record in records)
        if not records or self._taken >= self.num_bytes:
            os.truncate(self._path, 0)
            self._taken = 0
            self._resize(0)

    def _resize(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        metrics.AUDIT_SPOOL_BYTES.set(num_bytes)


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
