"""Turns the credentials of a request into a `Principal`, from memory alone.

Every key is looked up by its HMAC, so neither the lookup nor the answer tells an unknown key from a revoked one, and a
stolen snapshot holds no keys. Nothing of the Authorization header goes anywhere before its characters and length are
checked.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from inferflux.errors import PermissionDenied, Unauthenticated, Unavailable
from services.gateway.asgi import Headers
from services.gateway.endpoints import Scope

_SECRET = re.compile(rb"[\x21-\x7e]{8,256}")
_BAD_KEY = "the API key is not valid"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks, and what they may do."""

    key_id: str
    tenant: str
    scopes: frozenset[Scope]
    priority: int = 0
    cache_salt: str = ""

    def require(self, *scopes: Scope) -> None:
        """Raise PermissionDenied unless this principal has one of the scopes."""
        if self.scopes.isdisjoint((*scopes, Scope.ADMIN)):
            raise PermissionDenied(f"the API key lacks the scope {' or '.join(scopes)}")


@dataclass(frozen=True, slots=True)
class Key:
    """One live key. `expires_at`: seconds since the epoch, None = never."""

    secret_hash: bytes
    principal: Principal
    expires_at: float | None = None


@dataclass(frozen=True, slots=True)
class KeyRing:
    """All live keys at one revision of the policy."""

    revision: int = 0
    keys: Mapping[bytes, Key] = field(default_factory=dict)


def hash_secret(pepper: bytes, secret: bytes) -> bytes:
    """Hash a key as the policy service stores it."""
    return hmac.digest(pepper, secret, hashlib.sha256)


def cache_salt(tenant_key: bytes, tenant: str) -> str:
    """Separate the prefix caches of tenants; nobody without the cluster's secret can compute another's salt."""
    return hmac.digest(tenant_key, tenant.encode(), hashlib.sha256).hex()


class Authenticator:
    """Checks credentials against the newest key ring. `now` is the wall clock: expiry is a calendar date."""

    def __init__(
        self, pepper: bytes, keyring: Callable[[], KeyRing | None], now: Callable[[], float] = time.time
    ) -> None:
        self._pepper = pepper
        self._keyring = keyring
        self._now = now

    def authenticate(self, headers: Headers) -> Principal:
        """Return who asks. Raises Unauthenticated, or Unavailable as long as no policy was ever received."""
        secret = read_secret(headers)
        ring = self._keyring()
        if ring is None:
            raise Unavailable("the gateway has no policy yet", retry_after_s=1)
        digest = hash_secret(self._pepper, secret)
        key = ring.keys.get(digest)
        if key is None or not hmac.compare_digest(key.secret_hash, digest) or self._is_expired(key):
            raise Unauthenticated(_BAD_KEY)
        return key.principal

    def authorize(self, headers: Headers, scope: Scope) -> Principal:
        """Return who asks, if they may. Raises what `authenticate` raises, or PermissionDenied."""
        principal = self.authenticate(headers)
        principal.require(scope)
        return principal

    def _is_expired(self, key: Key) -> bool:
        return key.expires_at is not None and self._now() >= key.expires_at


def read_secret(headers: Headers) -> bytes:
    """Return the key of `Authorization: Bearer` or `x-api-key`, well-formed. Raises Unauthenticated."""
    authorization = headers.get(b"authorization")
    if authorization is None:
        secret = headers.get(b"x-api-key")
    else:
        scheme, _, secret = authorization.partition(b" ")
        if scheme.lower() != b"bearer":
            raise Unauthenticated("use Authorization: Bearer KEY, or x-api-key")
    if secret is None:
        raise Unauthenticated("no API key: use Authorization: Bearer KEY, or x-api-key")
    if not _SECRET.fullmatch(secret):
        raise Unauthenticated(_BAD_KEY)
    return secret
