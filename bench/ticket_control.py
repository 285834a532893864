"""What a ticket costs besides its bytes: the time to issue, claim and commit one over real gRPC and mutual TLS.

    python -m bench.ticket_control [--tickets 2000] [--concurrency 1,8] [--json FILE]

Starts one prefill worker process with the sim engine, which computes in no time, and talks to it as a gateway and as a
decode worker do. Prompts fill one small block; nobody reads it. Issue is the round trip of Prefill without the
engine's own time, so it includes the call, the check of the request, the book and the signature. Each ticket goes
through its stages one after the other; `concurrency` tickets are on their way at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import uvloop

from inferflux.v1 import prefill_service_pb2 as pb
from inferflux.v1 import types_pb2
from inferflux.v1.prefill_service_pb2_grpc import PrefillServiceStub
from tests.support.service import Service, temporary_home, until
from tests.support.small_gateway import completion, context

GOAL_P99_MS = 5.0
NUM_WARM = 50
STAGES = ("issue", "claim", "commit", "all")
PROFILE = Path(__file__).parents[1] / "inferflux" / "engine" / "sim_profile_instant.json"
SETTINGS = {"engine": "sim", "model": "m", "kv_arena_bytes": str(32 << 20), "sim_profile": str(PROFILE)}
CLAIMANT = pb.Claimant(worker_id="decode-0", incarnation="1")
PROMPTS = count(1)


@dataclass(frozen=True, slots=True)
class Result:
    """One stage at one concurrency, in milliseconds."""

    concurrency: int
    stage: str
    tickets: int
    p50_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True, slots=True)
class Ends:
    """The two sides that a ticket passes between."""

    gateway: Any
    decode: Any


async def prefill(ends: Ends) -> tuple[pb.PrefillResponse, float]:
    """Have a prompt computed that is not cached; returns the answer and the time it took without the engine's."""
    call = completion(f"{next(PROMPTS):08d}")
    request = pb.PrefillRequest(context=context().to_proto(), call=call.to_proto(), session_id="bench")
    began_at = time.perf_counter()
    response: pb.PrefillResponse = await ends.gateway.Prefill(request)
    took_s = time.perf_counter() - began_at
    return response, took_s - response.engine_time.ToTimedelta().total_seconds()


async def one_ticket(ends: Ends) -> tuple[float, float, float]:
    """Take one ticket through its life; returns the seconds of each stage."""
    response, issue_s = await prefill(ends)
    signed = response.prefilled.prompts[0].ticket
    ticket = types_pb2.KvTicket.FromString(signed.payload)
    refs = [pb.TicketRef(ticket_id=ticket.ticket_id, incarnation=ticket.incarnation)]
    began_at = time.perf_counter()
    granted = await ends.decode.Claim(pb.ClaimRequest(claimant=CLAIMANT, tickets=refs))
    claimed_at = time.perf_counter()
    committed = await ends.decode.Commit(pb.CommitRequest(claimant=CLAIMANT, tickets=refs))
    committed_at = time.perf_counter()
    if {*granted.verdicts, *committed.verdicts} != {pb.CLAIM_VERDICT_GRANTED}:
        raise RuntimeError(f"not granted: {granted.verdicts} {committed.verdicts}")
    await ends.gateway.Release(pb.ReleaseRequest(ticket_ids=[ticket.ticket_id], why="committed"))
    return issue_s, claimed_at - began_at, committed_at - claimed_at


async def measure(ends: Ends, concurrency: int, num_tickets: int) -> list[Result]:
    """Run warm tickets at one concurrency."""

    async def client(num: int) -> list[tuple[float, float, float]]:
        return [await one_ticket(ends) for _ in range(num)]

    await client(NUM_WARM)
    each = max(1, num_tickets // concurrency)
    spans = [span for spans in await asyncio.gather(*(client(each) for _ in range(concurrency))) for span in spans]
    columns = [*zip(*spans, strict=True), tuple(map(sum, spans))]
    return [result(concurrency, stage, column) for stage, column in zip(STAGES, columns, strict=True)]


def result(concurrency: int, stage: str, spans_s: Sequence[float]) -> Result:
    """Sum up one stage."""
    ordered = sorted(1e3 * span for span in spans_s)
    return Result(concurrency, stage, len(ordered), at(ordered, 0.5), at(ordered, 0.99), ordered[-1])


def at(ordered: Sequence[float], share: float) -> float:
    """Quantile of sorted numbers."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def run(concurrencies: Sequence[int], num_tickets: int) -> list[Result]:
    """Measure on a worker of our own."""
    with temporary_home() as home:
        (home / "run").mkdir()
        service = Service("services.prefill", "prefill-0", home, SETTINGS).start()
        try:
            await until(service.is_ready, timeout_s=60)
            async with service.channel("gateway") as gateway, service.channel("decode") as decode:
                ends = Ends(PrefillServiceStub(gateway), PrefillServiceStub(decode))
                watch = asyncio.ensure_future(keep(ends.gateway))
                try:
                    return [r for c in concurrencies for r in await measure(ends, c, num_tickets)]
                finally:
                    watch.cancel()
        finally:
            service.kill()


async def keep(gateway: Any) -> None:
    """Hold the lease of the tickets."""
    async for _ in gateway.Watch(pb.WatchRequest(session_id="bench", gateway_id="bench")):
        pass


def show(results: Sequence[Result]) -> None:
    """Print a table."""
    print(f"{'at once':>8} {'stage':<8} {'tickets':>8} {'p50 ms':>8} {'p99 ms':>8} {'max ms':>8}")
    for r in results:
        print(f"{r.concurrency:>8} {r.stage:<8} {r.tickets:>8} {r.p50_ms:8.2f} {r.p99_ms:8.2f} {r.max_ms:8.2f}")
    print(f"goal: p99 of all below {GOAL_P99_MS} ms; load average {os.getloadavg()[0]:.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tickets", type=int, default=2000)
    parser.add_argument("--concurrency", default="1,8")
    parser.add_argument("--json", type=Path, help="also write the results there")
    args = parser.parse_args()
    results = uvloop.run(run([int(c) for c in args.concurrency.split(",")], args.tickets))
    show(results)
    document = json.dumps({"results": [asdict(r) for r in results], "load_average": os.getloadavg()[0]})
    print(document)
    if args.json:
        args.json.write_text(document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
