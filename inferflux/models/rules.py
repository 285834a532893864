"""How strictly models are checked, and what counts against a signature that is valid otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class SignaturePolicy(StrEnum):
    """What a worker does with a model that does not verify: refuse it, say so and load it, or not look at all."""

    REQUIRE = "require"
    WARN = "warn"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class Rules:
    """What the registry says of a model.

    `floor`: versions below it were replaced. `revoked`: ids of keys that count no more. `revision` grows with changes.
    """

    floor: int = 0
    revoked: frozenset[str] = frozenset()
    revision: int = 0
