"""Turns the credentials of a request, an API key or an issuer's token, into a `Principal`, from memory alone.

Every key is looked up by its HMAC, so neither the lookup nor the answer tells an unknown key from a revoked one, and a
stolen snapshot holds no keys. Nothing of the Authorization header goes anywhere before its characters and length are
checked.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from inferflux.errors import PermissionDenied, Unauthenticated, Unavailable
from inferflux.policy.identity import Allowance, Identity
from services.gateway.asgi import Headers
from services.gateway.endpoints import Scope

if TYPE_CHECKING:
    from services.gateway.tokens import TokenVerifier

MAX_SECRET_BYTES, MAX_TOKEN_BYTES = 256, 16 * 1024
BAD_CREDENTIAL = "the API key is not valid"
"""Of whatever kind it is, and whatever is wrong with it."""
_CREDENTIAL = re.compile(rb"[\x21-\x7e]{8,%d}" % MAX_TOKEN_BYTES)
# A JWT: three parts, the first of which is a JSON object.
_TOKEN = re.compile(rb"eyJ[A-Za-z0-9_-]*\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")


class UnknownKey(Unauthenticated):
    """A token names a key that its issuer did not publish when it was last asked. `refreshed`: asks again, briefly."""

    refreshed: Callable[[], Awaitable[None]] | None = None


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks, and what they may do. `key_id`: of the API key, or one that stands for a token's subject.

    `team` is empty for keys without one.
    """

    key_id: str
    tenant: str
    scopes: frozenset[Scope]
    priority: int = 0
    cache_salt: str = ""
    team: str = ""
    allowance: Allowance = field(default_factory=Allowance)

    def require(self, *scopes: Scope) -> None:
        """Raise PermissionDenied unless this principal has one of the scopes."""
        if self.scopes.isdisjoint((*scopes, Scope.ADMIN)):
            raise PermissionDenied(f"the API key lacks the scope {' or '.join(scopes)}")


@dataclass(frozen=True, slots=True)
class Key:
    """One live secret of a key. `expires_at`: seconds since the epoch, None = never.

    `principal` is what the key grants by itself; the policy adds what its `roles` grant, and restricts it further.
    `models` None: no restriction.
    """

    secret_hash: bytes
    principal: Principal
    expires_at: float | None = None
    roles: tuple[str, ...] = ()
    models: tuple[str, ...] | None = None

    def under(self, identity: Identity) -> Principal:
        """Return whose key it is, as the policy sees it."""
        principal = self.principal
        if not (self.roles or identity.tenants or self.models is not None):
            return principal
        allowance = identity.allowance(principal.tenant, principal.team, self.models)
        return replace(principal, scopes=principal.scopes | identity.scopes(self.roles), allowance=allowance)


@dataclass(slots=True)
class KeyRing:
    """All live keys at one revision of the policy, by the hash of their secrets.

    Those that have expired are taken out by the next look for any key: then they are as unknown as keys that never
    were, and a look takes as long. `expiries`: instants and hashes, the next one last.
    """

    revision: int = 0
    keys: dict[bytes, Key] = field(default_factory=dict)
    expiries: list[tuple[float, bytes]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        expiries = ((key.expires_at, digest) for digest, key in self.keys.items() if key.expires_at is not None)
        self.expiries = sorted(expiries, reverse=True)

    def find(self, digest: bytes, now: float) -> Key | None:
        """Return the key of a hash that is good now."""
        if self.expiries and self.expiries[-1][0] <= now:
            self._drop_expired(now)
        return self.keys.get(digest)

    def _drop_expired(self, now: float) -> None:
        gone = set()
        while self.expiries and self.expiries[-1][0] <= now:
            gone.add(self.expiries.pop()[1])
        # A new one: what is deleted from a dictionary leaves a mark in it, and a look that meets one takes longer.
        self.keys = {digest: key for digest, key in self.keys.items() if digest not in gone}


def hash_secret(pepper: bytes, secret: bytes) -> bytes:
    """Hash a key as the policy service stores it."""
    return hmac.digest(pepper, secret, hashlib.sha256)


def cache_salt(tenant_key: bytes, tenant: str) -> str:
    """Separate the prefix caches of tenants; nobody without the cluster's secret can compute another's salt."""
    return hmac.digest(tenant_key, tenant.encode(), hashlib.sha256).hex()


_NO_IDENTITY = Identity()


class Authenticator:
    """Checks credentials against the newest key ring. `now` is the wall clock: expiry is a calendar date.

    `identity` says what the policy knows of tenants, roles and issuers, for a credential; without `tokens` only API
    keys are taken.
    """

    def __init__(
        self,
        pepper: bytes,
        keyring: Callable[[], KeyRing | None],
        now: Callable[[], float] = time.time,
        identity: Callable[[bytes], Identity] = lambda _: _NO_IDENTITY,
        tokens: TokenVerifier | None = None,
    ) -> None:
        self._pepper = pepper
        self._keyring = keyring
        self._now = now
        self._identity = identity
        self._tokens = tokens

    async def authorize(self, headers: Headers, *scopes: Scope) -> Principal:
        """Return who asks, if they may. Raises Unauthenticated, and what `admit` raises."""
        return await self.admit(read_credential(headers), *scopes)

    async def admit(self, credential: bytes, *scopes: Scope) -> Principal:
        """Return whose credential it is, if they may. Raises what `authenticate` raises, or PermissionDenied.

        Waits for nothing, except that a token may be signed by a key so new that its issuer must be asked again.
        """
        try:
            principal = self.authenticate(credential)
        except UnknownKey as e:
            if e.refreshed is not None:
                await e.refreshed()
            principal = self.authenticate(credential)
        principal.require(*scopes)
        return principal

    def authenticate(self, credential: bytes) -> Principal:
        """Return whose credential it is. Raises Unauthenticated, or Unavailable without a policy that may be used."""
        ring = self._keyring()
        if ring is None:
            raise Unavailable("the gateway has no policy yet", retry_after_s=1)
        identity = self._identity(credential)
        if self._tokens is not None and identity.issuers and _TOKEN.fullmatch(credential):
            return self._tokens.verify(credential, identity)
        return self._find(ring, credential).under(identity)

    def _find(self, ring: KeyRing, secret: bytes) -> Key:
        """Look a secret up, in the same steps and words for one that is unknown, revoked or expired."""
        key = ring.find(hash_secret(self._pepper, secret), self._now())
        if key is None or len(secret) > MAX_SECRET_BYTES:
            raise Unauthenticated(BAD_CREDENTIAL)
        return key


def read_credential(headers: Headers) -> bytes:
    """Return what is in `Authorization: Bearer` or `x-api-key`, well-formed. Raises Unauthenticated."""
    authorization = headers.get(b"authorization")
    if authorization is None:
        credential = headers.get(b"x-api-key")
    else:
        scheme, _, credential = authorization.partition(b" ")
        if scheme.lower() != b"bearer":
            raise Unauthenticated("use Authorization: Bearer KEY, or x-api-key")
    if credential is None:
        raise Unauthenticated("no API key: use Authorization: Bearer KEY, or x-api-key")
    if not _CREDENTIAL.fullmatch(credential):
        raise Unauthenticated(BAD_CREDENTIAL)
    return credential
