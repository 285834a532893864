"""Who is who on the wire: every service has a role, and its certificate says which.

A role's certificate carries `<role>.inferflux.internal` (checked by clients) and the SPIFFE id
`spiffe://inferflux.internal/role/<role>` (checked by servers), both signed by the cluster's private CA. Where the
issuer can't make URIs the name alone says the role. The files may change while the process runs: servers take new ones
with the next handshake, callers with the next channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import grpc

from inferflux.errors import ConfigError

ROLES = ("gateway", "prefill", "decode", "pooling", "policy", "registry", "guardrails", "operator")
TRUST_DOMAIN = "inferflux.internal"
_SPIFFE_PREFIX = f"spiffe://{TRUST_DOMAIN}/role/"
# Where a kubelet keeps the current version of a Secret's files: all of them change with this one link.
_VERSION = "..data"


@dataclass(frozen=True, slots=True)
class Identity:
    """One role's certificate and key, and the CA that peers must be signed by; all PEM."""

    role: str
    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)
    source: Path | None = field(default=None, compare=False)
    """The directory that it was read from, and is read from again."""

    @classmethod
    def load(cls, pki_dir: Path, role: str) -> Identity:
        """Read `ca.crt`, `<role>.crt` and `<role>.key`. Raises ConfigError."""
        version = (pki_dir / _VERSION).resolve() if (pki_dir / _VERSION).is_dir() else pki_dir
        try:
            ca, certificate, key = ((version / name).read_bytes() for name in ("ca.crt", f"{role}.crt", f"{role}.key"))
        except OSError as e:
            raise ConfigError(f"no usable identity {role!r} in {pki_dir}: {e}") from e
        return cls(role, ca, certificate, key, pki_dir)

    def current(self) -> Identity:
        """Read it again; the same one where that is impossible, e.g. while the files change."""
        if self.source is None:
            return self
        try:
            return Identity.load(self.source, self.role)
        except ConfigError:
            return self

    def server_credentials(self) -> grpc.ServerCredentials:
        """For servers that refuse callers without a certificate of our CA. Read anew for each handshake."""
        used = self

        def renew() -> grpc.ServerCertificateConfiguration | None:
            nonlocal used
            before, used = used, used.current()
            return None if used == before else used._configuration()  # noqa: SLF001  -- of our own class

        # Its stubs don't know that None means unchanged.
        fetch = cast("Callable[[], grpc.ServerCertificateConfiguration]", renew)
        return grpc.dynamic_ssl_server_credentials(self._configuration(), fetch, require_client_authentication=True)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For channels that trust our CA only."""
        return grpc.ssl_channel_credentials(self.ca, self.key, self.certificate)

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(self.key, self.certificate)], root_certificates=self.ca)


def dns_name(role: str) -> str:
    """Build the name that clients expect in the certificate of a server of this role."""
    return f"{role}.{TRUST_DOMAIN}"


def spiffe_id(role: str) -> str:
    """Build the id that servers look for in the certificate of a caller of this role."""
    return _SPIFFE_PREFIX + role


def caller_role(auth_context: Mapping[str, Iterable[bytes]]) -> str | None:
    """Find the one role in a verified peer certificate; None when it names none or several."""
    names = [name.decode("ascii", "replace") for name in auth_context.get("x509_subject_alternative_name", ())]
    roles = {name.removeprefix(_SPIFFE_PREFIX) for name in names if name.startswith(_SPIFFE_PREFIX)}
    suffix = f".{TRUST_DOMAIN}"
    roles |= {name.removesuffix(suffix) for name in names if name.endswith(suffix) and "/" not in name}
    return roles.pop() if len(roles) == 1 else None
