"""One registered worker, as a value."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from inferflux.errors import InvalidRequest
from inferflux.types import ModelFingerprint, Role, State

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
ADDRESS = re.compile(r"unix:/[!-~]{1,250}|[A-Za-z0-9.:_\[\]-]{1,250}:[0-9]{1,5}")


@dataclass(frozen=True, slots=True)
class HeldAdapter:
    """An adapter on a worker; see the message of this name."""

    name: str
    revision: int
    digest: str


@dataclass(frozen=True, slots=True)
class Worker:
    """What a worker says of itself; see WorkerRecord for the fields."""

    worker_id: str
    incarnation: str
    role: Role
    model: str
    address: str
    state: State
    fingerprint: ModelFingerprint
    reason: str = ""
    host_id: str = ""
    engine: str = ""
    max_model_len: int = 0
    max_num_seqs: int = 0
    transports: tuple[str, ...] = ()
    adapters: tuple[HeldAdapter, ...] = ()
    max_adapters: int = 0

    def __post_init__(self) -> None:
        _require(NAME, self.worker_id, "worker_id")
        _require(NAME, self.incarnation, "incarnation")
        _require(ADDRESS, self.address, "address")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Worker:
        """Raises InvalidRequest, ValueError, KeyError or TypeError."""
        typed = {
            "role": Role(fields["role"]),
            "state": State(fields["state"]),
            "fingerprint": ModelFingerprint(**fields["fingerprint"]),
        }
        adapters = tuple(HeldAdapter(**adapter) for adapter in fields.get("adapters", ()))
        return cls(**(fields | typed | {"transports": tuple(fields.get("transports", ())), "adapters": adapters}))


def _require(pattern: re.Pattern[str], value: str, param: str) -> None:
    if not pattern.fullmatch(value):
        raise InvalidRequest(f"{param} is not valid", param=param)
