"""Small model folders and keys for tests: nothing an engine could compute with, everything that is checked before."""

from __future__ import annotations

import json
from pathlib import Path

from inferflux.models import signing
from inferflux.models.folder import ModelFolder
from inferflux.models.manifest import NAME, Manifest, SignedFile
from inferflux.models.verification import measure

CONFIG = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 512}


def make_folder(folder: Path, config: object = CONFIG, weights: bytes = b"\x00" * 4096) -> Path:
    """A complete Hugging Face folder, as far as anybody looks at it without loading it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def sign(folder: Path, key: Path, *, name: str = "m", version: int = 1, chain: tuple[Path, ...] = (), **fields) -> Path:
    """Give a folder a manifest and a signature."""
    for own in (NAME, "model.sig"):
        (folder / own).unlink(missing_ok=True)
    with ModelFolder.open(folder) as opened:
        files: dict[str, SignedFile] = measure(opened, opened.names)
    fields = {"capabilities": ("chat", "completion")} | fields
    (folder / NAME).write_bytes(Manifest(name=name, version=version, files=files, **fields).dump())
    return signing.sign(folder, key, chain)


def make_keys(directory: Path) -> Path:
    """A directory of trusted keys with one key `release`; its private half is beside it, in `private`."""
    trusted, private = directory / "keys", directory / "private"
    trusted.mkdir(parents=True)
    private.mkdir()
    signing.make_key(private, "release")
    (private / "release.pub").rename(trusted / "release.pub")
    return trusted
