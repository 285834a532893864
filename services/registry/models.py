"""The models that clients can name, as values.

A record is made by the first worker that serves the model, and follows later starts of workers, unless an operator put
it: then it stays as put. A model outlives its workers: a call for it is told to come back, not that it never was.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from inferflux.errors import InvalidRequest, NotFound
from inferflux.models.capabilities import POOLING

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")


@dataclass(frozen=True, slots=True)
class Model:
    """One model; see ModelRecord for the fields. `is_pinned`: put by an operator."""

    name: str
    digest: str = ""
    dtype: str = ""
    max_model_len: int = 0
    capabilities: tuple[str, ...] = ()
    created_at_ms: int = 0
    is_default: bool = False
    is_pinned: bool = False
    version: int = 0
    signed_by: str = ""
    parent: str = ""
    tenants: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise InvalidRequest("model name must be 1 to 128 of A-Z a-z 0-9 . _ : / @ + -", param="model")

    @property
    def is_pooling(self) -> bool:
        """Whether it does nothing but pooling: it can't answer a question."""
        return bool(self.capabilities) and POOLING.issuperset(self.capabilities)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Model:
        """Raises InvalidRequest, KeyError or TypeError."""
        texts = {name: tuple(fields.get(name, ())) for name in ("capabilities", "tenants")}
        return cls(**(fields | texts))


@dataclass(frozen=True, slots=True)
class ModelBook:
    """All records and the revision of their last change; 0 is a book that was never stored."""

    revision: int = 0
    models: Mapping[str, Model] = field(default_factory=dict)

    def learn(self, models: Iterable[Model], now_ms: int) -> ModelBook:
        """Take over what new workers say of their models. Idempotent; the same book when there is nothing new."""
        learned = {model.name: self._learned(model) for model in models}
        news = {name: model for name, model in learned.items() if self.models.get(name) != model}
        return self._with({**self.models, **news}, now_ms) if news else self

    def put(self, model: Model, now_ms: int) -> ModelBook:
        """Create or replace a record; a new default takes the place of the old one."""
        models = dict(self.models)
        if model.is_default:
            models = {name: replace(other, is_default=False) for name, other in models.items()}
        known = self.models.get(model.name)
        created_at_ms = model.created_at_ms or (known.created_at_ms if known else now_ms)
        models[model.name] = replace(model, created_at_ms=created_at_ms, is_pinned=True)
        return self._with(models, now_ms)

    def set_default(self, name: str, now_ms: int) -> ModelBook:
        """Make one record the default. Raises NotFound."""
        if name not in self.models:
            raise NotFound(f"no model {name!r}")
        models = {other: replace(model, is_default=other == name) for other, model in self.models.items()}
        return self if models == self.models else self._with(models, now_ms)

    def delete(self, name: str, now_ms: int) -> ModelBook:
        """Remove a record. Raises NotFound."""
        if name not in self.models:
            raise NotFound(f"no model {name!r}")
        return self._with({other: model for other, model in self.models.items() if other != name}, now_ms)

    def restore(self, memory: ModelBook, now_ms: int) -> ModelBook:
        """Return the stored book (self), or its repair when it is older than memory."""
        if self.revision >= memory.revision:
            return self
        return ModelBook(max(memory.revision + 1, now_ms), {**self.models, **memory.models})

    def listed(self, served: Iterable[str]) -> tuple[Model, ...]:
        """List the records by name, exactly one of them the default: if nobody chose one, the oldest that is served.

        A model that only turns text into numbers is nobody's default while there is another.
        """
        models = [self.models[name] for name in sorted(self.models)]
        if models and not any(model.is_default for model in models):
            names = set(served)
            first = min(models, key=lambda model: (model.is_pooling, model.name not in names, model.created_at_ms))
            models = [replace(model, is_default=model is first) for model in models]
        return tuple(models)

    def _learned(self, model: Model) -> Model:
        known = self.models.get(model.name)
        if known is None:
            return replace(model, is_default=False, is_pinned=False)
        if known.is_pinned:
            return known
        return replace(model, created_at_ms=known.created_at_ms, is_default=known.is_default, is_pinned=False)

    def _with(self, models: Mapping[str, Model], now_ms: int) -> ModelBook:
        return ModelBook(max(self.revision + 1, now_ms), models)
