"""A LoRA adapter's files, taken into a folder of our own: what is checked, named and loaded can't change any more."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from inferflux.errors import ModelRefused
from inferflux.models import manifest
from inferflux.models.folder import ModelFolder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS)
MAX_BYTES = 4 << 30
MAX_CONFIG_BYTES = 1 << 20
DIGEST_NAME_CHARS = 32


def take(source: Path, directory: Path, check: Callable[[ModelFolder], None]) -> tuple[Path, str]:
    """Copy an adapter from `source` to a folder in `directory`; returns it and the SHA-256 over its files.

    `check` may refuse the opened files before they are read. Idempotent. Raises ModelRefused, naming the file.
    """
    partial = directory / f".{os.getpid()}-{os.urandom(4).hex()}"
    try:
        with ModelFolder.open(source) as folder:
            for name in FILES:
                if name not in folder.names:
                    raise ModelRefused(
                        f"{name}: missing, {source} is no adapter (other formats of weights are not read)"
                    )
            if (size := folder.size(WEIGHTS)) > MAX_BYTES:
                raise ModelRefused(f"{WEIGHTS}: {size} bytes, the limit is {MAX_BYTES}")
            manifest.refuse_code({CONFIG: folder.read(CONFIG, MAX_CONFIG_BYTES)})
            check(folder)
            partial.mkdir(parents=True, mode=0o700)
            digests = {name: folder.copy(name, partial / name) for name in FILES}
        digest = hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in FILES).encode()).hexdigest()
        target = directory / digest[:DIGEST_NAME_CHARS]
        if not target.is_dir():
            partial.rename(target)
        return target, digest
    finally:
        shutil.rmtree(partial, ignore_errors=True)
