"""What one registry replica knows first-hand, as it puts it into Redis for the others and for its own next start."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from inferflux.errors import InvalidRequest
from services.registry.workers import Worker


@dataclass(frozen=True, slots=True)
class Roster:
    """`beat` grows with each writing: readers prolong leases only when it has. `gone`: ended incarnations by id."""

    beat: int
    workers: tuple[Worker, ...]
    gone: Mapping[str, str]

    def encode(self) -> str:
        fields = {"beat": self.beat, "workers": [w.to_json() for w in self.workers], "gone": dict(self.gone)}
        return json.dumps(fields)

    @classmethod
    def decode(cls, text: str) -> Roster | None:
        """Return None for what is no roster, of this version."""
        try:
            fields = json.loads(text)
            workers = tuple(Worker.from_json(worker) for worker in fields["workers"])
            gone = {str(worker_id): str(incarnation) for worker_id, incarnation in fields["gone"].items()}
            return cls(int(fields["beat"]), workers, gone)
        except (InvalidRequest, ValueError, KeyError, TypeError, AttributeError):
            return None
