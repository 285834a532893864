"""What it costs a worker to verify its model, against one SHA-256 over the same bytes.

python -m bench.model_verify [--mib 257] [--rounds 7]

The model is a made-up folder of one large and a few small files in the page cache; a real one takes as long per byte.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from pathlib import Path

from inferflux.models import manifest, signing
from inferflux.models.anchors import Anchors
from inferflux.models.folder import ModelFolder
from inferflux.models.manifest import Manifest
from inferflux.models.rules import Rules
from inferflux.models.verification import measure, verify


def make(root: Path, num_bytes: int) -> tuple[Path, Path]:
    """Make a signed model and the directory of its key."""
    folder, keys = root / "m", root / "keys"
    folder.mkdir()
    keys.mkdir()
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    with (folder / "model.safetensors").open("wb") as file:
        for start in range(0, num_bytes, 1 << 20):
            file.write(os.urandom(min(1 << 20, num_bytes - start)))
    with ModelFolder.open(folder) as opened:
        files = measure(opened, opened.names)
    (folder / manifest.NAME).write_bytes(Manifest(name="m", version=1, files=files).dump())
    started_at = time.perf_counter()
    signing.sign(folder, signing.make_key(keys, "bench"))
    print(f"sign       {time.perf_counter() - started_at:6.3f} s, the import of model-signing included")
    return folder, keys


def raw(folder: Path) -> None:
    with (folder / "model.safetensors").open("rb", buffering=0) as file:
        hashlib.file_digest(file, "sha256")


def verified(folder: Path, keys: Path) -> None:
    with ModelFolder.open(folder) as opened:
        verify(opened, Anchors.load(keys), Rules())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=float, default=256.6)  # smollm2-135m: 269 MB
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ifx-") as name:
        folder, keys = make(Path(name), int(options.mib * (1 << 20)))
        raw_s, verify_s = [], []
        for _ in range(options.rounds):  # in turns: what disturbs one disturbs the other
            for spans, work in ((raw_s, lambda: raw(folder)), (verify_s, lambda: verified(folder, keys))):
                started_at = time.perf_counter()
                work()
                spans.append(time.perf_counter() - started_at)
    ratio = statistics.median(verify_s) / statistics.median(raw_s)
    print(f"SHA-256    {statistics.median(raw_s):6.3f} s (median of {options.rounds})")
    print(f"verify     {statistics.median(verify_s):6.3f} s, {ratio:.2f} times as long")
    assert ratio <= 2, "verifying takes more than twice as long as hashing"


if __name__ == "__main__":
    main()
