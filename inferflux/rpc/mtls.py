"""Who is who on the wire: every service has a role, and its certificate says which.

A role's certificate carries `<role>.inferflux.internal` (checked by clients) and the SPIFFE id
`spiffe://inferflux.internal/role/<role>` (checked by servers), both signed by the cluster's private CA.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from inferflux.errors import ConfigError

ROLES = ("gateway", "prefill", "decode", "policy", "registry", "guardrails", "operator")
TRUST_DOMAIN = "inferflux.internal"
_SPIFFE_PREFIX = f"spiffe://{TRUST_DOMAIN}/role/"


@dataclass(frozen=True, slots=True)
class Identity:
    """One role's certificate and key, and the CA that peers must be signed by; all PEM."""

    role: str
    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)

    @classmethod
    def load(cls, pki_dir: Path, role: str) -> Identity:
        """Read `ca.crt`, `<role>.crt` and `<role>.key`. Raises ConfigError."""
        try:
            ca, certificate, key = ((pki_dir / name).read_bytes() for name in ("ca.crt", f"{role}.crt", f"{role}.key"))
        except OSError as e:
            raise ConfigError(f"no usable identity {role!r} in {pki_dir}: {e}") from e
        return cls(role, ca, certificate, key)

    def server_credentials(self) -> grpc.ServerCredentials:
        """For servers that refuse callers without a certificate of our CA."""
        pair = (self.key, self.certificate)
        return grpc.ssl_server_credentials([pair], root_certificates=self.ca, require_client_auth=True)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For channels that trust our CA only."""
        return grpc.ssl_channel_credentials(self.ca, self.key, self.certificate)


def dns_name(role: str) -> str:
    """Build the name that clients expect in the certificate of a server of this role."""
    return f"{role}.{TRUST_DOMAIN}"


def spiffe_id(role: str) -> str:
    """Build the id that servers look for in the certificate of a caller of this role."""
    return _SPIFFE_PREFIX + role


def caller_role(auth_context: Mapping[str, Iterable[bytes]]) -> str | None:
    """Find the one role in a verified peer certificate; None when it names none or several."""
    names = (name.decode("ascii", "replace") for name in auth_context.get("x509_subject_alternative_name", ()))
    roles = [name.removeprefix(_SPIFFE_PREFIX) for name in names if name.startswith(_SPIFFE_PREFIX)]
    return roles[0] if len(roles) == 1 else None
