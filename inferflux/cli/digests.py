"""What files a model consists of and their digests, kept so that 269 MB are hashed once and not at every start.

The combined `weights_digest` covers the files that decide what KV blocks hold (config.json and the weights), so it is
what two workers compare before one reads the other's blocks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from inferflux.models.manifest import weights_digest

NAME = "digests.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class FileDigest:
    """One file. `size` and `mtime_ns` unchanged: the digest still holds."""

    sha256: str
    size: int
    mtime_ns: int

    def is_fresh(self, path: Path) -> bool:
        """Say whether `path` is there and looks as it did when it was hashed."""
        try:
            stat = path.stat()
        except OSError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.mtime_ns)


@dataclass(frozen=True, slots=True)
class Digests:
    """Digests of a model folder's files, by name relative to the folder."""

    files: Mapping[str, FileDigest]

    @property
    def weights_digest(self) -> str:
        """Digest over config.json and all weights, independent of where the folder lies."""
        return weights_digest({name: file.sha256 for name, file in self.files.items()})

    def is_fresh(self, folder: Path, names: Iterable[str]) -> bool:
        """Say whether `folder` holds exactly these files, unchanged."""
        return set(names) == set(self.files) and all(f.is_fresh(folder / n) for n, f in self.files.items())

    def save(self, path: Path) -> None:
        """Write atomically."""
        document = {
            "format": FORMAT,
            "weights_digest": self.weights_digest,
            "files": {name: asdict(file) for name, file in sorted(self.files.items())},
        }
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(document, indent=1))
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Digests | None:
        """Read digests; None when there is none or it can't be used."""
        try:
            document = json.loads(path.read_text())
            files = {name: FileDigest(**file) for name, file in document["files"].items()}
            return cls(files) if document["format"] == FORMAT else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    @classmethod
    def compute(cls, folder: Path, names: Iterable[str], on_fraction: Callable[[float], None]) -> Digests:
        """Hash all files."""
        names = sorted(names)
        total = sum((folder / n).stat().st_size for n in names) or 1
        files, done = {}, 0
        for name in names:
            files[name] = file = hash_file(folder / name)
            done += file.size
            on_fraction(done / total)
        return cls(files)


def hash_file(path: Path) -> FileDigest:
    """Hash one file. A file that changes meanwhile gets its old mtime, so it is hashed again next time."""
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileDigest(digest, stat.st_size, stat.st_mtime_ns)
