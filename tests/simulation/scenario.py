"""What happens in a seed: requests, faults that always leave one usable path, and the invariants that must hold."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field

from tests.simulation.loop import Stuck, run
from tests.simulation.world import SimWorker, World, make_requests

HORIZON_S = 12.0
LOAD_S = 6.0
SETTLE_S = 8.0
END_S = 70.0
CALM_S = 1.5
"""From the end of one fault of a role to the next: by then everybody knows that the worker is back."""


@dataclass(slots=True)
class Result:
    """One seed. `story`: what was done, for people."""

    seed: int
    complaints: list[str] = field(default_factory=list)
    story: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def simulate(seed: int) -> Result:
    """Run one seed."""
    result = Result(seed)
    with World.made(seed) as world:
        try:
            run(_play(world, result))
        except Stuck as e:
            result.complaints.append(str(e))
    return result


async def _play(world: World, result: Result) -> None:
    loop = asyncio.get_running_loop()
    problems: list[str] = []
    loop.set_exception_handler(lambda _, context: problems.append(str(context.get("exception") or context["message"])))
    await world.start()
    began_at = loop.time()
    requests = make_requests(world.rng, world.rng.randrange(6, 18))
    times = [began_at + world.rng.uniform(0, LOAD_S) for _ in requests]
    asks = [asyncio.create_task(_ask_at(world, at, request)) for at, request in zip(times, requests, strict=True)]
    faults = [asyncio.create_task(_break(world, result, role)) for role in ("decode", "prefill", "network")]
    await asyncio.gather(*faults)
    world.network.heal()
    world.is_registry_up = True
    world.announce()
    await asyncio.wait(asks, timeout=END_S)
    for request in requests:
        result.counts["requests"] += 1
        if complaint := request.complaint():
            kind = "stream" if request.is_streamed else "whole"
            result.complaints.append(f"request {request.number} ({kind}, {request.num_tokens} tokens): {complaint}")
    await _settle(world, result)
    if not result.complaints:
        await world.hold_ticket_and_vanish(world.rng.choice(world.prefills))
        await _settle(world, result)
    result.complaints += [f"on the loop: {problem}" for problem in problems]
    await world.stop()


async def _ask_at(world: World, at: float, request: object) -> None:
    await asyncio.sleep(max(0.0, at - asyncio.get_running_loop().time()))
    await world.ask(request)  # type: ignore[arg-type]


async def _settle(world: World, result: Result) -> None:
    """Wait until nothing is held any more."""
    for _ in range(int(SETTLE_S / 0.1)):
        held = world.held() + world.unleased()
        if not held:
            return
        await asyncio.sleep(0.1)
    result.complaints += held


async def _break(world: World, result: Result, role: str) -> None:
    """Break things of one kind, one after the other, so that a path is always left."""
    rng = world.rng
    loop = asyncio.get_running_loop()
    began_at = loop.time()
    for _ in range(rng.randrange(0, 3)):
        await asyncio.sleep(rng.uniform(0.2, LOAD_S / 2))
        if loop.time() - began_at > HORIZON_S:
            return
        worker = rng.choice(world.decodes if role == "decode" else world.prefills)
        kind, deed = (_network_fault if role == "network" else _worker_fault)(world, rng, worker)
        result.story.append(f"{loop.time() - began_at:7.3f} {kind}")
        result.counts[kind.split()[0]] += 1
        await deed
        await asyncio.sleep(CALM_S)


def _worker_fault(world: World, rng: random.Random, worker: SimWorker):
    name, gateway = worker.worker_id, world.gateway.name
    span_s = rng.choice((0.3, 0.9, 3.0, 5.0, 25.0))
    kind = rng.choice(("crash", "crash", "crash", "hang", "drain", "cut", "cut-to", "cut-from"))
    match kind:
        case "crash":
            return f"crash {name}", worker.crash()
        case "drain":
            return f"drain {name}", worker.drain()
        case "hang":
            return f"hang {name} for {span_s} s", _for_a_while(world, span_s, lambda: world.network.freeze(name))
    ends = {"cut": [(gateway, name), (name, gateway)], "cut-to": [(gateway, name)], "cut-from": [(name, gateway)]}[kind]
    return f"{kind} {name} for {span_s} s", _for_a_while(world, span_s, lambda: [world.network.cut(*e) for e in ends])


def _network_fault(world: World, rng: random.Random, _: SimWorker):
    span_s = rng.uniform(0.5, 4.0)
    if rng.random() < 0.5:
        return f"registry-down for {span_s:.1f} s", _without_registry(world, span_s)
    return f"slow network for {span_s:.1f} s", _for_a_while(
        world, span_s, lambda: setattr(world.network, "slowness", 50.0)
    )


async def _without_registry(world: World, span_s: float) -> None:
    world.is_registry_up = False
    await asyncio.sleep(span_s)
    if world.rng.random() < 0.5:
        world.forget_workers()
        await asyncio.sleep(0.3)
    world.is_registry_up = True
    world.announce()


async def _for_a_while(world: World, span_s: float, begin) -> None:
    begin()
    await asyncio.sleep(span_s)
    world.network.heal()
