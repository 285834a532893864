"""API keys as values: made, checked and written down here, without I/O. Secrets never get into a Key."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from inferflux.errors import ConfigError, InvalidRequest
from inferflux.policy.identity import Scope, key_id
from services.policy.pepper import Pepper

# Visible ASCII without the separators of INFERFLUX_API_KEYS.
SECRET = re.compile(r"[!-+\--9;-~]{8,256}")
NAME = re.compile(r"[^\x00-\x1f\x7f]{1,64}")
MODEL = re.compile(r"[^\x00-\x1f\x7f]{1,256}")
TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Key:
    """One API key. `revision` is that of the book which got this version of it; instants are unix milliseconds.

    `models` None: no restriction. `previous_hash`: of the secret before the last rotation, good until
    `previous_until_ms`.
    """

    key_id: str
    secret_hash: bytes
    name: str
    scopes: frozenset[Scope]
    tenant: str = "default"
    created_at_ms: int = 0
    expires_at_ms: int | None = None
    priority: int = 0
    revision: int = 0
    team: str = ""
    roles: frozenset[str] = frozenset()
    models: tuple[str, ...] | None = None
    previous_hash: bytes = b""
    previous_until_ms: int = 0

    @property
    def hashes(self) -> set[bytes]:
        """Of all its secrets."""
        return {self.secret_hash, self.previous_hash} - {b""}

    def rotated(self, secret_hash: bytes, until_ms: int) -> Key:
        """Give it another secret; the one it has now is good until then."""
        return replace(self, secret_hash=secret_hash, previous_hash=self.secret_hash, previous_until_ms=until_ms)

    def is_expired(self, now_ms: int) -> bool:
        return self.expires_at_ms is not None and self.expires_at_ms <= now_ms

    def granting(self, other: Key) -> Key:
        """Open the same doors as another one, with the same secrets as now."""
        return replace(
            self,
            scopes=other.scopes,
            tenant=other.tenant,
            priority=other.priority,
            expires_at_ms=other.expires_at_ms,
            team=other.team,
            roles=other.roles,
            models=other.models,
        )


def new_secret() -> str:
    """Make a secret with 256 random bits."""
    return "ifx_" + secrets.token_urlsafe(32)


def new_key(
    secret: str,
    pepper: Pepper,
    *,
    name: str,
    scopes: Iterable[Scope],
    tenant: str = "",
    expires_at_ms: int | None = None,
    priority: int = 0,
    team: str = "",
    roles: Collection[str] = (),
    models: Iterable[str] | None = None,
    now_ms: int,
) -> Key:
    """Make the record of a secret. Raises InvalidRequest.

    The id comes from the hash: the same secret is the same key, whoever registers it and how often.
    """
    secret_hash = hash_secret(secret, pepper)
    _require(NAME, name, "name", "1 to 64 characters without control characters")
    for param, value in (("tenant", tenant or "default"), ("team", team or "none"), *(("roles", r) for r in roles)):
        _require(TENANT, value, param, "1 to 64 of A-Z a-z 0-9 . _ -")
    for model in models or ():
        _require(MODEL, model, "models", "1 to 256 characters without control characters")
    if not (granted := frozenset(scopes)) and not roles:
        raise InvalidRequest("a key needs at least one scope or role", param="scopes")
    if expires_at_ms is not None and expires_at_ms <= now_ms:
        raise InvalidRequest("expires_at is in the past", param="expires_at")
    return Key(
        key_id=key_id(secret_hash),
        secret_hash=secret_hash,
        name=name,
        scopes=granted,
        tenant=tenant or "default",
        created_at_ms=now_ms,
        expires_at_ms=expires_at_ms,
        priority=priority,
        team=team,
        roles=frozenset(roles),
        models=tuple(models) if models is not None else None,
    )


def hash_secret(secret: str, pepper: Pepper) -> bytes:
    """Hash a well-formed secret. Raises InvalidRequest."""
    _require(SECRET, secret, "secret", "8 to 256 visible ASCII characters without comma and colon")
    return pepper.hash_secret(secret)


def parse_api_keys(entries: Iterable[str], pepper: Pepper, *, now_ms: int) -> list[Key]:
    """Read the `secret:scope+scope` entries of INFERFLUX_API_KEYS. Raises ConfigError naming all bad ones."""
    keys, problems = [], []
    for position, entry in enumerate(entries, 1):
        secret, _, scopes = entry.strip().partition(":")
        try:
            granted = [Scope(scope) for scope in scopes.split("+")]
            keys.append(new_key(secret, pepper, name="environment", scopes=granted, now_ms=now_ms))
        except ValueError:
            problems.append(f"INFERFLUX_API_KEYS entry {position}: scopes are {', '.join(Scope)}, joined by +")
        except InvalidRequest as e:
            problems.append(f"INFERFLUX_API_KEYS entry {position}: {e.message}")
    if problems:
        raise ConfigError("\n".join(problems))
    return keys


def encode_key(key: Key) -> str:
    """Write a record."""
    fields = {
        "key_id": key.key_id,
        "secret_hash": key.secret_hash.hex(),
        "name": key.name,
        "scopes": sorted(key.scopes),
        "tenant": key.tenant,
        "created_at_ms": key.created_at_ms,
        "expires_at_ms": key.expires_at_ms,
        "priority": key.priority,
        "revision": key.revision,
        "team": key.team,
        "roles": sorted(key.roles),
        "models": key.models,
        "previous_hash": key.previous_hash.hex(),
        "previous_until_ms": key.previous_until_ms,
    }
    return json.dumps(fields)


def decode_key(text: str) -> Key:
    """Read a record. Raises ValueError, KeyError or TypeError when it is of another version."""
    fields = json.loads(text)
    models = fields.get("models")  # records of earlier versions lack this and the next three
    return Key(
        **fields
        | {
            "secret_hash": bytes.fromhex(fields["secret_hash"]),
            "scopes": frozenset(Scope(scope) for scope in fields["scopes"]),
            "roles": frozenset(fields.get("roles", ())),
            "models": tuple(models) if models is not None else None,
            "previous_hash": bytes.fromhex(fields.get("previous_hash", "")),
        }
    )


def _require(pattern: re.Pattern[str], value: str, param: str, rule: str) -> None:
    if not pattern.fullmatch(value):
        raise InvalidRequest(f"{param} must be {rule}", param=param)
