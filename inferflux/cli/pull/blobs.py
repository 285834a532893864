"""The content-addressed part of INFERFLUX_MODELS: each file once, by its SHA-256, whichever models have it.

`.blobs/<sha256>` are read-only files; a model's folder has hard links to them, so it looks and costs like any folder.
A blob with one link is in no model any more: it is kept as a cache, until room or `inferctl models gc` wants it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from inferflux.cli.digests import hash_file

NAME = ".blobs"


@dataclass(frozen=True, slots=True)
class Blob:
    """One stored file. `is_free`: no model has it."""

    path: Path
    num_bytes: int
    is_free: bool
    used_at: float


class BlobStore:
    """The blobs of one models directory. Callers hold the directory's lock."""

    def __init__(self, models_dir: Path) -> None:
        self._directory = models_dir / NAME

    def find(self, sha256: str) -> Path | None:
        """Return a blob that is there."""
        path = self._directory / sha256
        return path if sha256 and path.is_file() else None

    def adopt(self, path: Path) -> str:
        """Make `path` one more name of a blob, of the one that is there or of a new one; returns its SHA-256."""
        sha256 = hash_file(path).sha256
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        blob = self._directory / sha256
        if blob.exists():
            path.unlink()
            os.link(blob, path)
        else:
            path.chmod(0o444)
            os.link(path, blob)
        os.utime(blob)
        return sha256

    def link(self, sha256: str, path: Path) -> None:
        """Give a blob one more name."""
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(self._directory / sha256, path)

    def blobs(self) -> list[Blob]:
        """All blobs, the longest unused first."""
        found = []
        for path in self._directory.glob("*"):
            stat = path.stat()
            found.append(Blob(path, stat.st_size, stat.st_nlink == 1, stat.st_mtime))
        return sorted(found, key=lambda blob: blob.used_at)
