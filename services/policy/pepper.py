"""The cluster's pepper: turns secrets into hashes, which are of no use to whoever lacks it."""

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
        return hmac.digest(self._key, secret.encode(), hashlib.sha256)
