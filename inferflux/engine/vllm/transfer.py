"""What travels through vLLM's `extra_args` and back: names and shapes both processes agree on.

vLLM carries `kv_transfer_params` untouched from the client to the scheduler's connector and back with the finished
output. `DELIVERED` holds tokens that were sampled elsewhere and count as output here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from inferflux.engine.base import KvSource
from inferflux.types import NixlPeer, Transport

PARAMS = "kv_transfer_params"
EC_PARAMS = "ec_transfer_params"
PUBLISH = "publish"
SOURCE = "source"
SLOTS = "slots"
# Prefill: slots that have the prompt's first blocks already, and back: how many tokens the source brought, or FAILED.
SHARED = "shared"
NUM_READ = "num_read_tokens"
FAILED = -1
# vLLM's own names. With the first in prefill's parameters its scheduler adds the second; with both in decode's, clients
# are told what prefill had cached instead of what came by ticket.
REMOTE = "do_remote_prefill"
CACHED = "remote_prefill_cached_tokens"
DELIVERED = "inferflux_delivered"
EXPERTS_PER_LINE = 256


def source_to_params(source: KvSource) -> dict[str, Any]:
    """Parameters of a request that reads a ticket's blocks."""
    return {SOURCE: plain(source), REMOTE: True, CACHED: source.num_cached_tokens}


def plain(source: KvSource) -> dict[str, Any]:
    """Flatten for msgspec: plain types only."""
    raw = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(replace(source, claim=None)).items()
    }
    return {**raw, "transport": str(source.transport)}


def without_client_values(extra_args: dict[str, Any] | None) -> dict[str, Any]:
    """Drop what only we may say: vLLM copies fields of the request's body into `extra_args`."""
    return {k: v for k, v in (extra_args or {}).items() if k not in (PARAMS, EC_PARAMS, DELIVERED)}


def source_from_params(params: dict[str, Any] | None) -> KvSource | None:
    """Inverse of `source_to_params`; None when the request has no source."""
    raw = (params or {}).get(SOURCE)
    if raw is None:
        return None
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in raw.items()}
    fields["transport"] = Transport(raw["transport"])
    fields["peer"] = NixlPeer(**raw["peer"]) if raw["peer"] else None
    return KvSource(**fields)


@dataclass(frozen=True, slots=True)
class Report:
    """What became of a source; one JSON line in the pipe (well under PIPE_BUF, so lines never mix)."""

    ticket_id: str
    result: str
    reason: str = ""
    num_bytes: int = 0
    transfer_s: float = 0.0

    def send(self, fd: int) -> None:
        os.write(fd, json.dumps(asdict(self)).encode() + b"\n")

    @classmethod
    def merge(cls, reports: Sequence[Report]) -> Report:
        """Sum up what became of one source in several loads: the worst result, all bytes, the longest time."""
        worst = min(reports, key=lambda r: ("recomputed", "committed", "unneeded").index(r.result))
        num_bytes, transfer_s = sum(r.num_bytes for r in reports), max(r.transfer_s for r in reports)
        return replace(worst, num_bytes=num_bytes, transfer_s=transfer_s)


@dataclass(frozen=True, slots=True)
class ExpertReport:
    """Tokens that routers sent to the experts `first`, `first + 1`, ...; one JSON line in the pipe of reports."""

    first: int
    expert_tokens: list[int]

    @classmethod
    def send_all(cls, tokens: Sequence[int], fd: int) -> None:
        """Send tokens by expert, in lines that are short enough not to mix with those of others."""
        for first in range(0, len(tokens), EXPERTS_PER_LINE):
            report = cls(first, list(tokens[first : first + EXPERTS_PER_LINE]))
            os.write(fd, json.dumps(asdict(report)).encode() + b"\n")


def parse(line: bytes) -> Report | ExpertReport:
    """Read one line of the pipe."""
    fields = json.loads(line)
    return ExpertReport(**fields) if "expert_tokens" in fields else Report(**fields)
