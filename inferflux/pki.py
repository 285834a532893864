"""The private PKI and the shared secrets of a local cluster, made on first start.

Elsewhere an operator (e.g. cert-manager) provides the same files. All files are 0600; calls are idempotent and
safe from several processes at once. A certificate near its end is renewed by the next call; the CA and the secrets
never change.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from inferflux.paths import private_dir
from inferflux.policy.signature import KEY_FILE, PUBLIC_FILE, public_key
from inferflux.rpc.mtls import ROLES, dns_name, spiffe_id

SECRETS = ("ticket.key", "pepper.key", "tenant.key", "store.key", KEY_FILE)
SECRET_BYTES = 32
CA_LIFE = timedelta(days=3650)
ROLE_LIFE = timedelta(days=365)
RENEW_BEFORE = timedelta(days=60)
_SKEW = timedelta(hours=1)


def ensure_pki(directory: Path, roles: Sequence[str] = ROLES, life: timedelta = ROLE_LIFE) -> None:
    """Create what is missing of `ca.crt`, `ca.key` and each role's `<role>.crt` and `<role>.key` (valid for `life`)."""
    with _locked(directory):
        stale = [role for role in roles if _is_stale(directory, role)]
        if stale:
            ca_certificate, ca_key = _ensure_ca(directory)
            for role in stale:
                _issue(directory, role, life, ca_certificate, ca_key)


def ensure_secrets(directory: Path) -> None:
    """Create what is missing of SECRETS (32 random bytes each), and the public half of `snapshot.key`."""
    with _locked(directory):
        for name in SECRETS:
            if not (directory / name).exists():
                _write(directory / name, secrets.token_bytes(SECRET_BYTES))
        if not (directory / PUBLIC_FILE).exists():
            _write(directory / PUBLIC_FILE, public_key((directory / KEY_FILE).read_bytes()))


def _is_stale(directory: Path, role: str) -> bool:
    files = [directory / name for name in ("ca.crt", f"{role}.crt", f"{role}.key")]
    if not all(file.exists() for file in files):
        return True
    certificate = x509.load_pem_x509_certificate(files[1].read_bytes())
    return certificate.not_valid_after_utc - datetime.now(UTC) < RENEW_BEFORE


def _ensure_ca(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate_file, key_file = directory / "ca.crt", directory / "ca.key"
    if not (certificate_file.exists() and key_file.exists()):
        _create_ca(certificate_file, key_file)
    key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError(f"{key_file} is not an EC key")
    return x509.load_pem_x509_certificate(certificate_file.read_bytes()), key


def _create_ca(certificate_file: Path, key_file: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = common_name("InferFlux private CA")
    certificate = (
        builder(name, name, key.public_key(), CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(is_ca=True), critical=True)
    )
    _write(key_file, private_pem(key))
    _write(certificate_file, certificate.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


def _issue(
    directory: Path, role: str, life: timedelta, ca: x509.Certificate, ca_key: ec.EllipticCurvePrivateKey
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    names = x509.SubjectAlternativeName([x509.DNSName(dns_name(role)), x509.UniformResourceIdentifier(spiffe_id(role))])
    usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    certificate = (
        builder(common_name(dns_name(role)), ca.subject, key.public_key(), life)
        .add_extension(names, critical=False)
        .add_extension(usages, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage(is_ca=False), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
    )
    _write(directory / f"{role}.key", private_pem(key))
    _write(
        directory / f"{role}.crt", certificate.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    )


def builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, life: timedelta
) -> x509.CertificateBuilder:
    """Begin a certificate that is valid from now on for `life`."""
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def key_usage(*, is_ca: bool) -> x509.KeyUsage:
    """Say what a key may do: sign certificates, or anything else."""
    return x509.KeyUsage(
        digital_signature=not is_ca,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def common_name(name: str) -> x509.Name:
    """Make the name of a subject that has no more than one."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Write a key down, unencrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes) -> None:
    """Put the whole file in place at once, readable by its owner only, and on disk before it can be used."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with open(temporary, "xb", opener=_private_opener) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _private_opener(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    private_dir(directory)
    with open(directory / ".lock", "wb", opener=_private_opener) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
