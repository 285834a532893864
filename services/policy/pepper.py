"""The cluster's pepper: turns secrets into hashes, and seals the records that go to Redis.

Whoever can write to Redis could otherwise write itself an admin key. (It can still delete records, or put back an old
one.) Hashes and seals cannot be confused: what is sealed starts with a byte that no secret contains.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from inferflux.errors import ConfigError

MIN_BYTES = 16


class Pepper:
    """A secret key that all policy services and gateways of a cluster share."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def load(cls, path: Path) -> Pepper:
        """Read the key file. Raises ConfigError."""
        try:
            key = path.read_bytes()
        except OSError as e:
            raise ConfigError(f"cannot read {path}: {e.strerror}") from e
        if len(key) < MIN_BYTES:
            raise ConfigError(f"{path} holds {len(key)} bytes, at least {MIN_BYTES} are needed")
        return cls(key)

    def hash_secret(self, secret: str) -> bytes:
        """Hash an API key's secret, as gateways do with what clients send."""
        return self._mac(secret.encode())

    def seal(self, payload: str) -> str:
        """Put a message authentication code before the payload."""
        return f"{self._seal_of(payload)} {payload}"

    def open(self, sealed: str) -> str:
        """Return the payload. Raises ValueError when the pepper did not seal it."""
        mac, _, payload = sealed.partition(" ")
        if not hmac.compare_digest(mac.encode(), self._seal_of(payload).encode()):
            raise ValueError("seal does not match")
        return payload

    def _seal_of(self, payload: str) -> str:
        return self._mac(b"\0" + payload.encode()).hex()

    def _mac(self, data: bytes) -> bytes:
        return hmac.new(self._key, data, hashlib.sha256).digest()
