"""Whose signatures count: public keys and root certificates, as files that the operator put there.

A directory with `*.pub` (public keys) and `*.crt` (certificates that may sign others), PEM. The id of a key is the
SHA-256 of its PEM text, as signatures carry it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from inferflux.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Anchors:
    """Public keys by id, and roots."""

    keys: Mapping[str, ec.EllipticCurvePublicKey]
    roots: Sequence[x509.Certificate] = ()

    def __bool__(self) -> bool:
        return bool(self.keys or self.roots)

    @classmethod
    def load(cls, directory: Path) -> Anchors:
        """Read all files of a directory; none at all when it is not there. Raises ConfigError."""
        keys = [_load_key(path) for path in sorted(directory.glob("*.pub"))]
        roots = [root for path in sorted(directory.glob("*.crt")) for root in _load_roots(path)]
        return cls({key_id(key): key for key in keys}, roots)


def key_id(key: ec.EllipticCurvePublicKey) -> str:
    """Name a key: SHA-256 over its PEM text, lower-case hex."""
    return hashlib.sha256(to_pem(key)).hexdigest()


def to_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """Write a public key as PEM."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _load_key(path: Path) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path}: not a public key in PEM") from e
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{path}: a {type(key).__name__}, only elliptic curve keys sign models")
    return key


def _load_roots(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path}: no certificates in PEM") from e
