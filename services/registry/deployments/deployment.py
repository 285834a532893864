"""What operators want of models, as values: a spec with a revision, and how far the cluster is with it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import PurePath
from typing import Any

from inferflux.errors import InvalidRequest
from services.registry import strict
from services.registry.models import NAME

MAX_WORKERS = 64
MAX_DRAIN_S = 86_400.0
MAX_SOURCE = 1024
SETTINGS = (
    "dtype",
    "kv_cache_bytes",
    "kv_arena_bytes",
    "max_model_len",
    "max_num_seqs",
    "block_size",
    "threads",
    "tensor_parallel",
    "pipeline_parallel",
    "data_parallel",
    "expert_parallel",
    "executor",
    "max_adapters",
    "max_adapter_rank",
)
"""Settings of workers that a deployment may choose: what concerns its engine, and nothing that concerns the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model. `source`: its folder, or a name in the models directory; empty: the simulator needs none.

    `prefill`, `decode`: how many workers it begins with; afterwards the planner or an operator sizes its pools.
    `settings`: of its workers, by name. `drain_s`: how long what runs may take when these workers are replaced.
    `revision`: new with each change.
    """

    model: str
    source: str = ""
    prefill: int = 1
    decode: int = 1
    settings: Mapping[str, str] = field(default_factory=dict)
    drain_s: float = 60.0
    revision: int = 0

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise InvalidRequest("; ".join(problems), param="model")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: object) -> ModelSpec:
        """Read a document strictly. Raises InvalidRequest that names every unknown, missing or ill-typed key."""
        return cls(**strict.read(cls, document, _READERS, what="a model", param="model"))

    def _problems(self) -> list[str]:
        source = PurePath(self.source)
        is_name = len(source.parts) == 1 and source.name not in ("", ".", "..")
        unknown = sorted(self.settings.keys() - set(SETTINGS))
        checks = {
            f"model {self.model[:64]!r} is not a model's name": bool(NAME.fullmatch(self.model)),
            f"prefill {self.prefill} is not from 0 to {MAX_WORKERS}": 0 <= self.prefill <= MAX_WORKERS,
            f"decode {self.decode} is not from 1 to {MAX_WORKERS}": 1 <= self.decode <= MAX_WORKERS,
            f"drain_s {self.drain_s:g} is not from 0 to {MAX_DRAIN_S:g}": 0 <= self.drain_s <= MAX_DRAIN_S,
            f"source has {len(self.source)} characters, the limit is {MAX_SOURCE}": len(self.source) <= MAX_SOURCE,
            "source is neither an absolute path nor a name in the models directory": (
                not self.source or source.is_absolute() or is_name
            ),
            f"settings {', '.join(map(repr, unknown))[:200]}: there are {', '.join(SETTINGS)}": not unknown,
        }
        return [problem for problem, is_fine in checks.items() if not is_fine]


class Stage(StrEnum):
    """Where a deployment is."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    UNLOADING = "unloading"


@dataclass(frozen=True, slots=True)
class Deployment:
    """One model. `wanted` None: it goes. `current` None: no workers of ours serve it. `error`: why `wanted` failed."""

    model: str
    wanted: ModelSpec | None
    current: ModelSpec | None = None
    error: str = ""

    @property
    def stage(self) -> Stage:
        if self.wanted is None:
            return Stage.UNLOADING
        if self.error:
            return Stage.FAILED
        return Stage.READY if self.wanted == self.current else Stage.LOADING

    @property
    def kept(self) -> ModelSpec | None:
        """What should have workers, whatever becomes of `wanted`."""
        return self.current if self.wanted is not None else None

    def load(self, spec: ModelSpec) -> Deployment:
        """Want this from now on."""
        return replace(self, wanted=spec, error="")

    def unload(self) -> Deployment:
        return replace(self, wanted=None, error="")

    def settled(self, revision: int) -> Deployment:
        """Say that a revision serves; nothing changes if another one is wanted meanwhile."""
        is_it = self.wanted is not None and self.wanted.revision == revision
        return replace(self, current=self.wanted, error="") if is_it else self

    def failed(self, revision: int, error: str) -> Deployment:
        """Say why a revision can't serve; nothing changes if another one is wanted meanwhile."""
        is_it = self.wanted is not None and self.wanted.revision == revision
        return replace(self, error=error) if is_it else self

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Deployment:
        """Raises InvalidRequest, KeyError or TypeError."""
        wanted, current = (ModelSpec.from_json(s) if s else None for s in (document["wanted"], document["current"]))
        return cls(document["model"], wanted, current, document["error"])


def _settings(value: object) -> dict[str, str]:
    """Read what becomes environment variables: text, numbers and truth values."""
    if not isinstance(value, dict) or not all(isinstance(v, str | int) for v in value.values()):
        raise ValueError("must be an object of texts, whole numbers and truth values")
    return {str(k): str(v).lower() if isinstance(v, bool) else str(v) for k, v in value.items()}


_READERS: Mapping[str, strict.Reader] = {
    "model": strict.text,
    "source": strict.text,
    "prefill": strict.integer,
    "decode": strict.integer,
    "settings": _settings,
    "drain_s": strict.number,
    "revision": strict.integer,
}
