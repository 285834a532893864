"""Records for the registry's tests."""

from __future__ import annotations

from inferflux.types import ModelFingerprint, Role, State
from services.registry.models import Model
from services.registry.workers import Worker

FINGERPRINT = ModelFingerprint("ab" * 32, "float32", "plain", 16)


def worker(worker_id: str = "decode-0", incarnation: str = "000-a", **changes) -> Worker:
    fields = {"role": Role.DECODE, "model": "tiny", "address": "unix:/tmp/d.sock", "state": State.READY}
    return Worker(worker_id, incarnation, **(fields | {"fingerprint": FINGERPRINT} | changes))


def model(name: str = "tiny", **changes) -> Model:
    return Model(name, **({"digest": "ab" * 32, "dtype": "float32", "max_model_len": 512} | changes))
