"""Encrypts what goes to Redis: AES-256-GCM, bound to the name it is stored under, with a ring of keys.

Whoever reads Redis, its files or its backups sees neither documents nor names nor hashes; whoever writes to it can't
make up a record, change one or move it to another name. The first key of the ring encrypts, all of them decrypt: a new
key is first put behind the old one everywhere, then in front of it, and the old one is taken out at last.

A record is `v1.<key id>.<base64 of nonce and ciphertext>`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from inferflux.config import env_name
from inferflux.errors import ConfigError

KEY_BYTES = 32
NONCE_BYTES = 12
KEY_FILE = "store.key"
VERSION = "v1"


class Vault:
    """A ring of keys."""

    def __init__(self, keys: Iterable[bytes]) -> None:
        self._ciphers = {_key_id(key): AESGCM(key) for key in keys}
        self._active = next(iter(self._ciphers))

    @classmethod
    def load(cls, path: Path, encoded: tuple[str, ...] = ()) -> Vault:
        """Take the keys of the environment (base64) or, without any, of a file (32 bytes each). Raises ConfigError."""
        return cls([_decoded(text, n) for n, text in enumerate(encoded, 1)] or _read(path))

    def seal(self, name: str, text: str) -> str:
        """Encrypt what is stored under a name."""
        nonce = os.urandom(NONCE_BYTES)
        sealed = self._ciphers[self._active].encrypt(nonce, text.encode(), name.encode())
        return f"{VERSION}.{self._active}.{base64.b64encode(nonce + sealed).decode()}"

    def open(self, name: str, record: str) -> str:
        """Decrypt what was stored under a name. Raises ValueError when no key of the ring has sealed it so."""
        version, _, rest = record.partition(".")
        key_id, _, data = rest.partition(".")
        if version != VERSION or key_id not in self._ciphers:
            raise ValueError("no key of the ring has sealed it")
        try:
            sealed = _decode(data)
            nonce, sealed = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:]
            return self._ciphers[key_id].decrypt(nonce, sealed, name.encode()).decode()
        except (binascii.Error, InvalidTag) as e:
            raise ValueError("it was changed, or stored under another name") from e

    def is_current(self, record: str) -> bool:
        """Tell whether the first key has sealed it."""
        return record.startswith(f"{VERSION}.{self._active}.")


def _decode(text: str) -> bytes:
    """Decode base64, written as we write it: the last character may have bits that nothing reads."""
    data = base64.b64decode(text, validate=True)
    if base64.b64encode(data).decode() != text:
        raise binascii.Error("not the shortest way to write it")
    return data


def _key_id(key: bytes) -> str:
    return hashlib.sha256(b"inferflux store key\n" + key).hexdigest()[:8]


def _read(path: Path) -> list[bytes]:
    try:
        content = path.read_bytes()
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from e
    if not content or len(content) % KEY_BYTES:
        raise ConfigError(f"{path} holds {len(content)} bytes, {KEY_BYTES} per key are needed")
    return [content[i : i + KEY_BYTES] for i in range(0, len(content), KEY_BYTES)]


def _decoded(text: str, number: int) -> bytes:
    try:
        key = base64.b64decode(text, validate=True)
    except binascii.Error:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{env_name('store_keys')}: key {number} is not the base64 of {KEY_BYTES} bytes")
    return key
