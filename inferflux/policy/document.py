"""The policy document: everything that administrators decide, in one JSON object.

    {"identity": {...}, "limits": {...}, "guardrails": {...}, "audit": {...}}

Every section belongs to a module of its own; one that is absent restricts nothing. A document is stored, signed and
compared in its canonical form: the author's own values, keys sorted, no white space. Values that the author left out
are not written in, so that a document means the same to a gateway that knows more fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import orjson
from pydantic import ValidationError

from inferflux.errors import PolicyInvalid
from inferflux.policy.audit import AuditSection
from inferflux.policy.guardrails import GuardrailsSection
from inferflux.policy.identity import IdentitySection
from inferflux.policy.limits import LimitsSection
from inferflux.policy.section import Section

MAX_BYTES = 256 * 1024
MAX_PROBLEMS = 100
EMPTY = b"{}"


class PolicyDocument(Section):
    """All sections; None: absent."""

    identity: IdentitySection | None = None
    limits: LimitsSection | None = None
    guardrails: GuardrailsSection | None = None
    audit: AuditSection | None = None


SECTIONS = tuple(PolicyDocument.model_fields)


def parse(data: bytes) -> PolicyDocument:
    """Read a document. Raises PolicyInvalid with all of its problems, one per line, each with its JSON path."""
    _load(data)
    return _validate(data)


def canonical(data: bytes) -> bytes:
    """Return the canonical form of a document. Idempotent. Raises PolicyInvalid as `parse` does."""
    document = _load(data)
    _validate(data)
    return dump({name: section for name, section in document.items() if section is not None})


def dump(document: dict[str, Any]) -> bytes:
    """Write a JSON object in canonical form. Raises PolicyInvalid for what JSON can't hold."""
    try:
        return orjson.dumps(document, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError as e:
        raise PolicyInvalid(f"$: {e}") from e


def _validate(data: bytes) -> PolicyDocument:
    try:
        return PolicyDocument.model_validate_json(data)
    except ValidationError as e:
        raise PolicyInvalid(_problems(e)) from e


def _load(data: bytes) -> dict[str, Any]:
    """Read JSON more strictly than libraries do: a key that comes twice means two things to two readers."""
    if len(data) > MAX_BYTES:
        raise PolicyInvalid(f"$: the document has {len(data)} bytes, the limit is {MAX_BYTES}")
    try:
        document = json.loads(data, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except PolicyInvalid:
        raise
    except (ValueError, RecursionError) as e:
        raise PolicyInvalid(f"$: not JSON ({e})") from e
    if not isinstance(document, dict):
        raise PolicyInvalid("$: must be a JSON object")
    return document


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise PolicyInvalid(f"$: the key {twice[:64]!r} comes twice in one object")
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise PolicyInvalid(f"$: {name} is not JSON")


def _problems(error: ValidationError) -> str:
    """List what is wrong, without the values: they may be secrets."""
    errors = error.errors(include_input=False, include_url=False, include_context=False)
    lines = [f"{path(e['loc'])}: {e['msg']}" for e in errors[:MAX_PROBLEMS]]
    if len(errors) > MAX_PROBLEMS:
        lines.append(f"and {len(errors) - MAX_PROBLEMS} more")
    return "\n".join(lines)


def path(parts: Sequence[str | int] | Iterable[str | int]) -> str:
    """Write a place in a document, e.g. `$.limits.rules[0].requests_per_minute`."""
    return "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
