"""Ed25519 signatures of the policy service, by which gateways know that a snapshot is what it has decided.

The signing key stays with the policy service (`snapshot.key`: a seed of 32 bytes); gateways have public keys only
(`snapshot.pub`: one or more of 32 bytes each, so that a new key can be known everywhere before it signs anything).
"""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from inferflux.errors import ConfigError

KEY_BYTES = 32
KEY_FILE, PUBLIC_FILE = "snapshot.key", "snapshot.pub"


class Signer:
    """Signs; one per process."""

    def __init__(self, seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed)

    @classmethod
    def load(cls, path: Path) -> Signer:
        """Read a seed. Raises ConfigError."""
        return cls(_read(path, is_single=True))

    @property
    def public_key(self) -> bytes:
        """What verifiers need."""
        return self._key.public_key().public_bytes_raw()

    def sign(self, payload: bytes) -> bytes:
        return self._key.sign(payload)


class Verifier:
    """Knows the public keys of those who may sign."""

    def __init__(self, public_keys: bytes) -> None:
        keys = [public_keys[i : i + KEY_BYTES] for i in range(0, len(public_keys), KEY_BYTES)]
        self._keys = [Ed25519PublicKey.from_public_bytes(key) for key in keys]

    @classmethod
    def load(cls, path: Path) -> Verifier:
        """Read public keys. Raises ConfigError."""
        return cls(_read(path))

    def is_valid(self, signature: bytes, payload: bytes) -> bool:
        """Tell whether one of the keys has signed the payload."""
        return any(_is_signed_by(key, signature, payload) for key in self._keys)


def public_key(seed: bytes) -> bytes:
    """Return the public half of a signing key."""
    return Signer(seed).public_key


def _is_signed_by(key: Ed25519PublicKey, signature: bytes, payload: bytes) -> bool:
    try:
        key.verify(signature, payload)
    except InvalidSignature:
        return False
    return True


def _read(path: Path, *, is_single: bool = False) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from e
    if not content or len(content) % KEY_BYTES or (is_single and len(content) != KEY_BYTES):
        raise ConfigError(f"{path} holds {len(content)} bytes, {KEY_BYTES} are needed")
    return content
