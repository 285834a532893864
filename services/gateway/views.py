"""The cluster as the registry describes it, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

from inferflux.types import ModelFingerprint, Role, State, Transport


@dataclass(frozen=True, slots=True)
class Worker:
    """One registered worker. `host_id`: equal ids share memory. `transports`: how KV blocks reach or leave it.

    `adapters`: names of those that it holds.
    """

    worker_id: str
    incarnation: str
    role: Role
    model: str
    address: str
    state: State
    fingerprint: ModelFingerprint
    host_id: str
    max_num_seqs: int
    transports: frozenset[str] = frozenset({Transport.SHM})
    adapters: frozenset[str] = frozenset()

    def can_read(self, owner: Worker) -> bool:
        """Whether the two have a transport in common; shm only within a host."""
        common = self.transports & owner.transports
        return Transport.NIXL in common or (Transport.SHM in common and self.host_id == owner.host_id)


@dataclass(frozen=True, slots=True)
class FailedWorker:
    """A worker that could not load its model, or not prove it."""

    worker_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Model:
    """One model as clients see it. `created_at`: seconds since the epoch. No `capabilities`: they are not known.

    `version` 0 and no `signed_by`: its signature was not verified. `parent`: the model that this adapter is for.
    `tenants`: who may use it; none: all.
    """

    name: str
    digest: str
    dtype: str
    max_model_len: int
    capabilities: tuple[str, ...]
    created_at: int
    is_default: bool
    version: int = 0
    signed_by: str = ""
    failed_workers: tuple[FailedWorker, ...] = ()
    parent: str = ""
    tenants: tuple[str, ...] = ()

    def is_for(self, tenant: str | None) -> bool:
        """Whether a tenant may use it; None is everybody."""
        return tenant is None or not self.tenants or tenant in self.tenants


@dataclass(frozen=True, slots=True)
class ClusterView:
    """All workers and models at one revision of the registry."""

    revision: int = 0
    workers: tuple[Worker, ...] = ()
    models: tuple[Model, ...] = ()
