"""LoRA adapters, as values: what operators want of each. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

from inferflux.errors import InvalidRequest
from services.registry import strict
from services.registry.models import NAME

MAX_TENANTS = 256
MAX_SOURCE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """One adapter. `model`: whose workers hold it; `source`: its folder, which they can read.

    `tenants`: who may use it, none = all; for anybody else it does not exist. `is_pinned`: its weights stay where they
    can be used at once. `revision`: new with each change.
    """

    name: str
    model: str
    source: str
    tenants: tuple[str, ...] = ()
    is_pinned: bool = False
    revision: int = 0

    def __post_init__(self) -> None:
        checks = {
            f"name {self.name[:64]!r} is no name of an adapter": bool(NAME.fullmatch(self.name)),
            f"model {self.model[:64]!r} is not a model's name": bool(NAME.fullmatch(self.model)),
            "name and model are the same": self.name != self.model,
            "source is no absolute path": PurePath(self.source).is_absolute(),
            f"source has {len(self.source)} characters, the limit is {MAX_SOURCE}": len(self.source) <= MAX_SOURCE,
            f"tenants: {len(self.tenants)}, the limit is {MAX_TENANTS}": len(self.tenants) <= MAX_TENANTS,
        }
        if problems := [problem for problem, is_fine in checks.items() if not is_fine]:
            raise InvalidRequest("; ".join(problems), param="adapter")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: object) -> AdapterSpec:
        """Read a document strictly. Raises InvalidRequest that names every unknown, missing or ill-typed key."""
        return cls(**strict.read(cls, document, _READERS, what="an adapter", param="adapter"))


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError("must be a list of texts")
    return tuple(value)


_READERS: Mapping[str, strict.Reader] = {
    "name": strict.text,
    "model": strict.text,
    "source": strict.text,
    "tenants": _texts,
    "is_pinned": strict.flag,
    "revision": strict.integer,
}
