"""The specs of all pools, as one value with a revision. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from inferflux.errors import Conflict, InvalidRequest
from services.registry.planner.spec import PoolSpec

MAX_POOLS = 256


@dataclass(frozen=True, slots=True)
class PoolBook:
    """Specs by the name of their pool; revision 0 is a book that nobody ever put."""

    revision: int = 0
    pools: Mapping[str, PoolSpec] = field(default_factory=dict)

    def put(self, pools: Mapping[str, PoolSpec], revision: int, now_ms: int) -> PoolBook:
        """Replace all specs, if `revision` is this book's, or 0. Raises Conflict."""
        if revision not in (0, self.revision):
            raise Conflict(f"pools have revision {self.revision}, the change was made to {revision}: read them again")
        return PoolBook(max(self.revision + 1, now_ms), dict(pools))

    def encode(self) -> str:
        return encode(self.pools.values())


def encode(specs: Iterable[PoolSpec]) -> str:
    """Write specs as a JSON array."""
    return json.dumps([spec.to_json() for spec in specs])


def decode(text: str | bytes) -> dict[str, PoolSpec]:
    """Read a JSON array of specs, by name. Raises InvalidRequest."""
    try:
        documents = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InvalidRequest("pools: not JSON", param="pools") from e
    if not isinstance(documents, list) or len(documents) > MAX_POOLS:
        raise InvalidRequest(f"pools: must be a list of at most {MAX_POOLS}", param="pools")
    specs = [PoolSpec.from_json(document) for document in documents]
    pools = {spec.name: spec for spec in specs}
    if len(pools) < len(specs):
        raise InvalidRequest("pools: there are two specs of one pool", param="pools")
    return pools
