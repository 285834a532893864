"""Making room in INFERFLUX_MODELS: `inferctl models gc`, and the quota that every pull ends with."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from inferflux.cli.models import Progress, locked
from inferflux.cli.pull.blobs import BlobStore
from inferflux.cli.pull.pull import PARTIALS
from inferflux.cli.pull.receipt import Receipt

STALE_S = 86_400.0
"""A download that nobody went on with for a day."""


@dataclass(slots=True)
class Collected:
    """What was removed, and what there is now."""

    num_blobs: int = 0
    num_partials: int = 0
    models: list[str] = field(default_factory=list)
    freed_bytes: int = 0
    kept_bytes: int = 0


def collect(models_dir: Path, quota_bytes: int, keep: Collection[str], progress: Progress) -> Collected:
    """Remove stale downloads and files of no model; then, above the quota, the longest unused pulled models.

    `quota_bytes` 0: no quota. `keep`: models that stay, whatever the quota says.
    """
    models_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(models_dir / ".lock-pull", lambda: progress("waiting for another process", None)):
        done = Collected()
        _drop_partials(models_dir, done)
        _drop_free(models_dir, done)
        for receipt in Receipt.all(models_dir):
            if not quota_bytes or used_bytes(models_dir) <= quota_bytes:
                break
            if receipt.name not in keep:
                _drop_model(models_dir, receipt, done)
        done.kept_bytes = used_bytes(models_dir)
        return done


def enforce(models_dir: Path, quota_bytes: int, keep: Collection[str], progress: Progress) -> None:
    """Keep to a quota after a pull; files of no model stay as a cache as long as there is room."""
    if quota_bytes and used_bytes(models_dir) > quota_bytes:
        collect(models_dir, quota_bytes, keep, progress)


def used_bytes(models_dir: Path) -> int:
    """Sum up what was pulled, each file once."""
    return sum(blob.num_bytes for blob in BlobStore(models_dir).blobs())


def _drop_partials(models_dir: Path, done: Collected) -> None:
    for path in (models_dir / PARTIALS).glob("*"):
        stat = path.stat()
        if time.time() - stat.st_mtime > STALE_S:
            path.unlink()
            done.num_partials += 1
            done.freed_bytes += stat.st_size


def _drop_free(models_dir: Path, done: Collected) -> None:
    for blob in BlobStore(models_dir).blobs():
        if blob.is_free:
            blob.path.unlink()
            done.num_blobs += 1
            done.freed_bytes += blob.num_bytes


def _drop_model(models_dir: Path, receipt: Receipt, done: Collected) -> None:
    """Processes that serve it have its files open, and go on."""
    shutil.rmtree(models_dir / receipt.name, ignore_errors=True)
    (models_dir / receipt.path_in).unlink()
    done.models.append(receipt.name)
    _drop_free(models_dir, done)
