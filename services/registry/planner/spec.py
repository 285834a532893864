"""What an operator wants of one pool, as a value: bounds, goal, price, and whether the planner may act."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

from inferflux.errors import InvalidRequest
from inferflux.types import Role
from services.registry import strict
from services.registry.models import NAME
from services.registry.planner.scaling import MAX_REPLICAS, Cost, Slo

TARGET = re.compile(r"(deployment|statefulset)/[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
SLO_MS = {Role.PREFILL: 2000.0, Role.DECODE: 100.0}
"""guess: what a reader of a chat does not mind; used when nobody says another goal.
There is none for pooling: such pools are not planned."""


class Mode(StrEnum):
    """Whether the planner only says what it would do."""

    ADVISE = "advise"
    ACT = "act"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpec:
    """One pool. Numbers of 0 mean: not limited, or not known and to be learned.

    `slo_ms`: time to the first token for prefill, time per output token for decode; 0: a usual one. `tokens_per_s` and
    `max_sequences`: what one replica can do. `warm_up_s`: from the wish for a replica until it serves. `hold_s`: a pool
    shrinks only to what was needed within this time. `target`: its workload in Kubernetes, e.g. statefulset/decode.
    """

    model: str
    role: Role
    mode: Mode = Mode.ADVISE
    min_replicas: int = 1
    max_replicas: int = 8
    slo_ms: float = 0.0
    tokens_per_s: float = 0.0
    max_sequences: int = 0
    utilization: float = 0.85
    warm_up_s: float = 60.0
    hold_s: float = 600.0
    drain_s: float = 60.0
    cost_per_hour: float = 0.0
    max_cost_per_hour: float = 0.0
    max_cost_per_million_tokens: float = 0.0
    target: str = ""

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise InvalidRequest(f"pool {self.name}: " + "; ".join(problems), param="pools")

    @property
    def name(self) -> str:
        """Unique in the cluster, e.g. decode/smollm2-135m."""
        return f"{self.role}/{self.model}"

    @property
    def slo(self) -> Slo:
        """Goal and abilities, as the decision wants them."""
        latency_s = (self.slo_ms or SLO_MS[self.role]) / 1000
        return Slo(
            latency_s=latency_s,
            tokens_per_s=self.tokens_per_s,
            num_sequences=self.max_sequences,
            utilization=self.utilization,
            warm_up_s=self.warm_up_s,
        )

    @property
    def cost(self) -> Cost:
        """Bounds, as the decision wants them."""
        return Cost(
            min_replicas=self.min_replicas,
            max_replicas=self.max_replicas,
            per_hour=self.cost_per_hour,
            max_per_hour=self.max_cost_per_hour,
            max_per_million_tokens=self.max_cost_per_million_tokens,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: object) -> PoolSpec:
        """Read a document strictly. Raises InvalidRequest that names every unknown, missing or ill-typed key."""
        readers = {f.name: _READERS[str(f.type)] for f in fields(cls)}
        return cls(**strict.read(cls, document, readers, what="a pool", param="pools", prefix="pool: "))

    def _problems(self) -> list[str]:
        checks = {
            f"model {self.model[:64]!r} is not a model's name": bool(NAME.fullmatch(self.model)),
            f"min_replicas {self.min_replicas} is not from 1 to {MAX_REPLICAS}": 1 <= self.min_replicas <= MAX_REPLICAS,
            f"max_replicas {self.max_replicas} is not from 1 to {MAX_REPLICAS}": 1 <= self.max_replicas <= MAX_REPLICAS,
            f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}": (
                self.min_replicas <= self.max_replicas
            ),
            f"utilization {self.utilization:g} is not above 0 and at most 1": 0 < self.utilization <= 1,
            f"target {self.target[:64]!r} is neither deployment/NAME nor statefulset/NAME": (
                not self.target or bool(TARGET.fullmatch(self.target))
            ),
            "max_cost_per_hour and max_cost_per_million_tokens need cost_per_hour": bool(
                self.cost_per_hour or not (self.max_cost_per_hour or self.max_cost_per_million_tokens)
            ),
        }
        for name in _AMOUNTS:
            amount = getattr(self, name)
            checks[f"{name} {amount:g} is not from 0 to {MAX_AMOUNT:g}"] = 0 <= amount <= MAX_AMOUNT
        return [problem for problem, is_fine in checks.items() if not is_fine]


MAX_AMOUNT = 1e9
_AMOUNTS = (
    "slo_ms",
    "tokens_per_s",
    "max_sequences",
    "warm_up_s",
    "hold_s",
    "drain_s",
    "cost_per_hour",
    "max_cost_per_hour",
    "max_cost_per_million_tokens",
)


def _role(value: object) -> Role:
    if value not in SLO_MS:
        raise ValueError(f"must be one of {', '.join(SLO_MS)}")
    return Role(str(value))


def _mode(value: object) -> Mode:
    if value not in tuple(Mode):
        raise ValueError(f"must be one of {', '.join(Mode)}")
    return Mode(str(value))


_READERS = {"str": strict.text, "int": strict.integer, "float": strict.number, "Role": _role, "Mode": _mode}
