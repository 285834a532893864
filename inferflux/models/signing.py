"""Signing a model with the model-signing package, and making keys. Imported only by commands that sign: it is heavy."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from inferflux import pki
from inferflux.errors import ConfigError
from inferflux.models import bundle
from inferflux.models.anchors import to_pem

ROOT_LIFE, LEAF_LIFE = timedelta(days=3650), timedelta(days=365)


def sign(folder: Path, key: Path, chain: tuple[Path, ...] = ()) -> Path:
    """Sign all files of `folder`, all at once, into `model.sig`. `chain`: the key's certificate, then those above it.

    Raises ConfigError when the package is missing or a key or certificate can't be used.
    """
    try:
        from model_signing import hashing, signing  # noqa: PLC0415 - a second and 45 MB
    except ImportError as e:
        raise ConfigError("model-signing is not installed: pip install 'inferflux[signing]'") from e
    target, partial = folder / bundle.NAME, folder.parent / f".{folder.name}.{bundle.NAME}.{os.getpid()}"
    target.unlink(missing_ok=True)
    config = signing.Config().set_hashing_config(
        hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False),
    )
    try:
        if chain:
            above = list(chain[1:]) or [chain[0]]  # the package can't read an empty chain
            config.use_certificate_signer(private_key=key, signing_certificate=chain[0], certificate_chain=above)
        else:
            config.use_elliptic_key_signer(private_key=key)
        config.sign(folder, partial)
    except (ValueError, TypeError, OSError) as e:
        raise ConfigError(f"cannot sign {folder} with {key}: {e}") from e
    partial.replace(target)
    return target


def make_key(directory: Path, name: str) -> Path:
    """Make `name.key` (private, 0600) and `name.pub`, EC P-256; returns the private one. Raises FileExistsError."""
    key = ec.generate_private_key(ec.SECP256R1())
    path = directory / f"{name}.key"
    _write(path, pki.private_pem(key), 0o600)
    _write(directory / f"{name}.pub", to_pem(key.public_key()), 0o644)
    return path


def make_root(directory: Path, name: str) -> Path:
    """Make a root: `name.key` and the certificate `name.crt`, which may sign others; returns the certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = pki.common_name(name)
    certificate = (
        _builder(subject, subject, key.public_key(), key.public_key(), ROOT_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(pki.key_usage(is_ca=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(directory / f"{name}.key", pki.private_pem(key), 0o600)
    return _write(directory / f"{name}.crt", certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def issue(directory: Path, name: str, root: Path) -> Path:
    """Make `name.key` and its certificate `name.pem`, signed by the root `root` (a .crt beside its .key)."""
    issuer = x509.load_pem_x509_certificate(root.read_bytes())
    issuer_key = serialization.load_pem_private_key(root.with_suffix(".key").read_bytes(), None)
    if not isinstance(issuer_key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{root.with_suffix('.key')}: not an elliptic curve key")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = pki.common_name(name)
    certificate = (
        _builder(subject, issuer.subject, key.public_key(), issuer_key.public_key(), LEAF_LIFE)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(f"{name}.models.invalid")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(pki.key_usage(is_ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    _write(directory / f"{name}.key", pki.private_pem(key), 0o600)
    return _write(directory / f"{name}.pem", certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    life: timedelta,
) -> x509.CertificateBuilder:
    above = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key)
    return pki.builder(subject, issuer, key, life).add_extension(above, critical=False)


def _write(path: Path, content: bytes, mode: int) -> Path:
    """Write a new file; an existing key is never replaced."""
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(content)
    return path
