"""A model's folder through open file descriptors: what is hashed is what is loaded.

Descriptors stay with the files that were opened, whatever is renamed over them later. Engines take paths, so they get a
*view*: a private directory of links to /proc/<pid>/fd/<n>. A write into an open file is still possible; it moves the
file's ctime, which is looked at again once the model is loaded, and then the file is hashed again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from inferflux.errors import ModelRefused
from inferflux.models.paths import list_files, open_beneath

MAX_THREADS = 8
COPY_BYTES = 1 << 20
Stamp = tuple[int, int, int]


class ModelFolder:
    """All files below one folder, open for reading. Close it after whoever loads from its view."""

    def __init__(self, fds: dict[str, int]) -> None:
        self._fds = fds
        self._stamps: dict[str, Stamp] = {}
        self._hashes: dict[str, str] = {}

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator[ModelFolder]:
        """Open every file; they are closed at the end of the block. Raises ModelRefused."""
        fds: dict[str, int] = {}
        try:
            root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise ModelRefused(f"{folder}: {e.strerror}") from e
        try:
            for name in list_files(folder):
                fds[name] = open_beneath(root, name)
            yield cls(fds)
        finally:
            for fd in (root, *fds.values()):
                os.close(fd)

    @property
    def names(self) -> set[str]:
        """All files, relative to the folder."""
        return set(self._fds)

    def read(self, name: str, max_bytes: int) -> bytes:
        """Read a small file. Raises ModelRefused when it is larger than that."""
        content = os.pread(self._fds[name], max_bytes + 1, 0)
        if len(content) > max_bytes:
            raise ModelRefused(f"{name}: more than {max_bytes} bytes")
        return content

    def size(self, name: str) -> int:
        """Size of a file in bytes."""
        return os.fstat(self._fds[name]).st_size

    def digests(self, names: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Yield name and SHA-256 of files, the smallest first; several at a time. Leaves no thread behind."""
        ordered = sorted(names, key=self.size)
        with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
            yield from zip(ordered, pool.map(self._hash, ordered), strict=True)

    def copy(self, name: str, target: Path) -> str:
        """Copy a file; returns the SHA-256 of what was copied."""
        digest = hashlib.sha256()
        with open(f"/proc/self/fd/{self._fds[name]}", "rb") as source, target.open("xb") as file:  # noqa: PTH123
            while part := source.read(COPY_BYTES):
                digest.update(part)
                file.write(part)
        return digest.hexdigest()

    def changed(self) -> list[str]:
        """Name the hashed files whose content is not what it was then. Reads only those that look touched."""
        touched = [name for name, stamp in self._stamps.items() if self._stamp(name) != stamp]
        before = {name: self._hashes[name] for name in touched}
        return [name for name, digest in self.digests(touched) if digest != before[name]]

    def link(self, view: Path) -> None:
        """Make `view` a directory in which each name leads to its open file, for as long as this process has it."""
        shutil.rmtree(view, ignore_errors=True)
        view.mkdir(mode=0o700)
        for name, fd in self._fds.items():
            path = view / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(f"/proc/{os.getpid()}/fd/{fd}")

    def _hash(self, name: str) -> str:
        stamp = self._stamp(name)
        # Opened anew: a duplicate would share its position with whoever else reads.
        with open(f"/proc/self/fd/{self._fds[name]}", "rb", buffering=0) as file:  # noqa: PTH123
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._stamps.setdefault(name, stamp)
        self._hashes.setdefault(name, digest)
        return digest

    def _stamp(self, name: str) -> Stamp:
        stat = os.fstat(self._fds[name])
        return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
