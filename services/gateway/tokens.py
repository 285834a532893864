"""Tokens of OpenID Connect issuers: JWTs, verified from memory.

The token names its issuer; the policy says which keys, algorithms, audience and claims that issuer's tokens must have,
and what tenant, team and roles come of them. Nothing in a token's header may bring a key along or say where one is.
Verified tokens are remembered under the SHA-256 of all their bytes, for as long as neither policy nor keys change.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

import orjson

from inferflux.errors import PermissionDenied, Unauthenticated
from inferflux.policy.identity import ClaimMap, Identity, Issuer
from inferflux.telemetry import metrics
from services.gateway.auth import BAD_CREDENTIAL, Principal, UnknownKey
from services.gateway.jwks import Keys, KeySource, KeySources

if TYPE_CHECKING:
    from joserfc.jws import JWSRegistry

LEEWAY_S = 60
MAX_REMEMBERED = 4096
_FORBIDDEN_HEADERS = frozenset(("jwk", "jku", "x5u", "x5c", "crit", "b64", "enc", "zip"))
_TYPES = frozenset(("jwt", "at+jwt", "application/at+jwt"))


@dataclass(frozen=True, slots=True)
class Verified:
    """What a token opens, until when (seconds since the epoch), and what that was decided by."""

    principal: Principal
    expires_at: float
    issuer: Issuer
    identity: Identity
    source: KeySource
    keys: Keys


class TokenVerifier:
    """Checks tokens. `salt_of` makes a tenant's cache salt; `now` is the wall clock."""

    def __init__(
        self, sources: KeySources, salt_of: Callable[[str], str], now: Callable[[], float] = time.time
    ) -> None:
        self._sources = sources
        self._salt_of = salt_of
        self._now = now
        self._verified: OrderedDict[bytes, Verified] = OrderedDict()

    def verify(self, token: bytes, identity: Identity) -> Principal:
        """Return whose token it is. Raises Unauthenticated, PermissionDenied or Unavailable."""
        digest = hashlib.sha256(token).digest()
        known = self._verified.get(digest)
        if known is None or not self._still_holds(known, identity):
            known = self._verified[digest] = self._verify(token, identity)
            if len(self._verified) > MAX_REMEMBERED:
                self._verified.popitem(last=False)
        self._verified.move_to_end(digest)
        return known.principal

    def _still_holds(self, known: Verified, identity: Identity) -> bool:
        is_current = known.identity is identity and known.source.current(known.issuer.stale_s) is known.keys
        return is_current and self._now() < known.expires_at

    def _verify(self, token: bytes, identity: Identity) -> Verified:
        issuer = _issuer(token, identity)
        source = self._sources.of(issuer)
        keys = source.current(issuer.stale_s)
        claims = self._claims(token, issuer, source, keys)
        self._check(claims, issuer)
        principal = _principal(claims, issuer, identity, self._salt_of)
        metrics.JWTS.labels("verified").inc()
        return Verified(principal, claims["exp"] + LEEWAY_S, issuer, identity, source, keys)

    def _claims(self, token: bytes, issuer: Issuer, source: KeySource, keys: Keys) -> dict[str, Any]:
        """Verify the signature and return what it covers."""
        from joserfc import jwt  # noqa: PLC0415 - most gateways verify no tokens
        from joserfc.errors import JoseError  # noqa: PLC0415

        key_id = _check_header(token)
        key = keys.find(key_id)
        if key is None:
            metrics.JWTS.labels("key").inc()
            unknown = UnknownKey(BAD_CREDENTIAL)
            unknown.refreshed = source.refreshed
            raise unknown
        try:
            decoded = jwt.decode(token, key, algorithms=issuer.algorithms, registry=_registry(*issuer.algorithms))
        except (JoseError, ValueError, TypeError, RecursionError):
            _refuse("signature")
        return decoded.claims

    def _check(self, claims: dict[str, Any], issuer: Issuer) -> None:
        """Check the claims that every token must have, each within the leeway."""
        from joserfc.errors import JoseError  # noqa: PLC0415
        from joserfc.jwt import JWTClaimsRegistry  # noqa: PLC0415

        registry = JWTClaimsRegistry(
            now=int(self._now()),
            leeway=LEEWAY_S,
            iss={"essential": True, "value": issuer.issuer},
            aud={"essential": True, "values": issuer.audiences},
            sub={"essential": True},
            exp={"essential": True},
            iat={"essential": True},
        )
        try:
            registry.validate(claims)
            is_too_old = claims["exp"] - claims["iat"] > issuer.max_age_s or claims["iat"] < issuer.not_before
        except (JoseError, ValueError, TypeError, OverflowError):
            _refuse("claims")
        if is_too_old:
            _refuse("age")
        if claims["sub"] in issuer.blocked_subjects:
            _refuse("blocked")


def _issuer(token: bytes, identity: Identity) -> Issuer:
    """Find out who claims to have issued it; nothing of this is believed yet."""
    name = _read_part(token, 1).get("iss")
    issuer = identity.issuers.get(name) if isinstance(name, str) else None
    return issuer if issuer is not None else _refuse("issuer")


def _check_header(token: bytes) -> str | None:
    """Return the id of the key; refuse what a header must not say."""
    header = _read_part(token, 0)
    kind, key_id = header.get("typ", "JWT"), header.get("kid")
    if not _FORBIDDEN_HEADERS.isdisjoint(header) or not (isinstance(kind, str) and kind.lower() in _TYPES):
        _refuse("header")
    return key_id if key_id is None or isinstance(key_id, str) else _refuse("header")


def _read_part(token: bytes, number: int) -> dict[str, Any]:
    part = token.split(b".")[number]
    try:
        value = orjson.loads(base64.b64decode(part + b"=" * (-len(part) % 4), altchars=b"-_", validate=True))
    except ValueError:
        _refuse("shape")
    return value if isinstance(value, dict) else _refuse("shape")


@cache
def _registry(*algorithms: str) -> JWSRegistry:
    """Let issuers put more into headers than the library knows; what matters is checked above."""
    from joserfc.jws import JWSRegistry  # noqa: PLC0415

    return JWSRegistry(algorithms=list(algorithms), strict_check_header=False)


def _principal(
    claims: Mapping[str, Any], issuer: Issuer, identity: Identity, salt_of: Callable[[str], str]
) -> Principal:
    tenants = _mapped(claims, issuer.tenant)
    teams = _mapped(claims, issuer.team) if issuer.team is not None else set()
    if len(tenants) != 1 or len(teams) > 1:
        metrics.JWTS.labels("tenant").inc()
        raise PermissionDenied("the token belongs to no tenant of this cluster, or to more than one tenant or team")
    tenant, team = tenants.pop(), next(iter(teams), "")
    subject = hashlib.sha256(orjson.dumps([issuer.issuer, claims["sub"], tenant])).hexdigest()
    return Principal(
        key_id=f"oidc_{subject[:16]}",
        tenant=tenant,
        team=team,
        scopes=identity.scopes(_mapped(claims, issuer.roles)),
        cache_salt=salt_of(tenant),
        allowance=identity.allowance(tenant, team),
    )


def _mapped(claims: Mapping[str, Any], rule: ClaimMap) -> set[str]:
    """Return the names that a claim's values stand for, or the default when there are none."""
    value = _claim(claims, rule.claim) if rule.claim is not None else None
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    names = {rule.values[text] for text in texts if isinstance(text, str) and text in rule.values}
    return names or ({rule.default} if rule.default is not None else set())


def _claim(claims: Mapping[str, Any], path: str) -> Any:
    """Return a claim by its name, which may have dots in it, or by a path of names."""
    if path in claims:
        return claims[path]
    value: Any = claims
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _refuse(why: str) -> NoReturn:
    metrics.JWTS.labels(why).inc()
    raise Unauthenticated(BAD_CREDENTIAL)
