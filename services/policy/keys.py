"""API keys as values: made, checked and written down here, without I/O. Secrets never get into a Key."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from inferflux.errors import ConfigError, InvalidRequest
from inferflux.policy.identity import Scope
from services.policy.pepper import Pepper

# Visible ASCII without the separators of INFERFLUX_API_KEYS.
SECRET = re.compile(r"[!-+\--9;-~]{8,256}")
NAME = re.compile(r"[^\x00-\x1f\x7f]{1,64}")
TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Key:
    """One API key. `revision` is that of the book which got this version of it; instants are unix milliseconds."""

    key_id: str
    secret_hash: bytes
    name: str
    scopes: frozenset[Scope]
    tenant: str = "default"
    created_at_ms: int = 0
    expires_at_ms: int | None = None
    priority: int = 0
    revision: int = 0

    def is_expired(self, now_ms: int) -> bool:
        return self.expires_at_ms is not None and self.expires_at_ms <= now_ms

    def grants_same(self, other: Key) -> bool:
        """Tell whether both open the same doors; how and when they were made does not count."""
        return (self.scopes, self.tenant, self.priority, self.expires_at_ms) == (
            other.scopes,
            other.tenant,
            other.priority,
            other.expires_at_ms,
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
    now_ms: int,
) -> Key:
    """Make the record of a secret. Raises InvalidRequest.

    The id comes from the hash: the same secret is the same key, whoever registers it and how often.
    """
    _require(SECRET, secret, "secret", "8 to 256 visible ASCII characters without comma and colon")
    _require(NAME, name, "name", "1 to 64 characters without control characters")
    _require(TENANT, tenant or "default", "tenant", "1 to 64 of A-Z a-z 0-9 . _ -")
    if not (granted := frozenset(scopes)):
        raise InvalidRequest("a key needs at least one scope", param="scopes")
    if expires_at_ms is not None and expires_at_ms <= now_ms:
        raise InvalidRequest("expires_at is in the past", param="expires_at")
    secret_hash = pepper.hash_secret(secret)
    key_id = f"key_{secret_hash[:8].hex()}"
    return Key(key_id, secret_hash, name, granted, tenant or "default", now_ms, expires_at_ms, priority)


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


def encode_key(key: Key, pepper: Pepper) -> str:
    """Write a sealed record."""
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
    }
    return pepper.seal(json.dumps(fields))


def decode_key(text: str, pepper: Pepper) -> Key:
    """Read a sealed record. Raises ValueError when it is not ours, KeyError or TypeError when of another version."""
    fields = json.loads(pepper.open(text))
    fields["secret_hash"] = bytes.fromhex(fields["secret_hash"])
    fields["scopes"] = frozenset(Scope(scope) for scope in fields["scopes"])
    return Key(**fields)


def _require(pattern: re.Pattern[str], value: str, param: str, rule: str) -> None:
    if not pattern.fullmatch(value):
        raise InvalidRequest(f"{param} must be {rule}", param=param)
