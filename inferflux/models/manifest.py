"""What the signer says of a model: `inferflux-model.json`, one of the files that the signature covers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from inferflux.errors import ModelRefused

NAME = "inferflux-model.json"
REFERENCE = "inferflux-reference.json"
PROVENANCE = "inferflux-provenance.intoto.jsonl"
SCHEMA = 1
MAX_BYTES = 4 << 20
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")
MAX_VERSION = 2**31 - 1


@dataclass(frozen=True, slots=True)
class SignedFile:
    """One file. `sha256` in lower-case hex."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One version of one model.

    `version` grows with each release. `max_context`: prompt plus output in tokens, 0 = the engine's own. `numerics`:
    name of the file with what the model must compute, "" = none. `chat_template`: SHA-256 of the template, "" = none.
    `provenance`: name of the file with in-toto statements about where the model comes from.
    """

    name: str
    version: int
    format: str = "safetensors"
    architectures: tuple[str, ...] = ()
    tokenizer: tuple[str, ...] = ()
    chat_template: str = ""
    capabilities: tuple[str, ...] = ()
    max_context: int = 0
    numerics: str = ""
    licence: str = ""
    provenance: str = ""
    files: Mapping[str, SignedFile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not MODEL_NAME.fullmatch(self.name):
            raise ModelRefused(f"{NAME}: {self.name[:128]!r} is no model name")
        if not 0 < self.version <= MAX_VERSION:
            raise ModelRefused(f"{NAME}: version {self.version} is not between 1 and {MAX_VERSION}")

    @property
    def weights_digest(self) -> str:
        """See `weights_digest`."""
        return weights_digest({name: file.sha256 for name, file in self.files.items()})

    def dump(self) -> bytes:
        """Write it as JSON, always the same for equal manifests."""
        document = {"schema": SCHEMA, **asdict(self), "weights_digest": self.weights_digest}
        return json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"

    @classmethod
    def parse(cls, text: bytes) -> Manifest:
        """Read what `dump` wrote. Raises ModelRefused."""
        try:
            fields: dict[str, Any] = json.loads(text)
            schema, digest = fields.pop("schema"), fields.pop("weights_digest")
            if schema != SCHEMA:
                raise ModelRefused(f"{NAME}: schema {schema!r}, this version reads {SCHEMA}")
            fields["files"] = {str(name): SignedFile(**file) for name, file in fields["files"].items()}
            for name in ("architectures", "tokenizer", "capabilities"):
                fields[name] = tuple(map(str, fields[name]))
            manifest = cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ModelRefused(f"{NAME}: not a manifest ({type(e).__name__})") from e
        if manifest.weights_digest != digest:
            raise ModelRefused(f"{NAME}: its digest is not that of its files")
        return manifest


def weights_digest(files: Mapping[str, str]) -> str:
    """Digest over config.json and all weights (SHA-256 by name), wherever they lie: what two workers compare."""
    lines = [f"{name} {sha256}\n" for name, sha256 in sorted(files.items()) if decides_kv(name)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def decides_kv(name: str) -> bool:
    """Say whether the contents of KV blocks depend on this file."""
    return name == "config.json" or name.endswith(".safetensors")


def read_json(text: bytes, name: str) -> dict[str, Any]:
    """Read a JSON object of a model. Raises ModelRefused."""
    try:
        document = json.loads(text)
    except ValueError as e:
        raise ModelRefused(f"{name}: not JSON") from e
    if not isinstance(document, dict):
        raise ModelRefused(f"{name}: not a JSON object")
    return document


def refuse_code(configs: Mapping[str, bytes]) -> None:
    """Refuse a model whose configuration names code of its own (auto_map, trust_remote_code, custom pipelines)."""
    for name, text in configs.items():
        for key in ("auto_map", "trust_remote_code", "custom_pipelines"):
            if read_json(text, name).get(key) not in (None, False):
                raise ModelRefused(f"{name}: has {key}: models that bring their own code are not run")


def is_embedding(folder: Path) -> bool:
    """Say whether a folder's model gives vectors: sentence-transformers' models say how, in a list of modules."""
    return (folder / "modules.json").is_file()


def has_vision(folder: Path) -> bool:
    """Say whether a folder's model sees, by its configuration."""
    path = folder / "config.json"
    return path.is_file() and "vision_config" in read_json(path.read_bytes(), path.name)


def has_chat_template(folder: Path) -> bool:
    """Say whether a folder has a chat template, in a file of its own or in the tokenizer's configuration."""
    if any(folder.glob("chat_template.*")) or (folder / "chat_templates").is_dir():
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(read_json(path.read_bytes(), path.name).get("chat_template"))
