"""Thousands of wrong KV transfers, and as many right ones, through the real arena, ticket book, gate and hydration.

    python -m tests.chaos.corruption --cases 10000

A wrong one that is read as if it were right would be a wrong token some day; a right one that is refused, wasted work.
Not tried: a prefill worker that signs blocks in a wrong order with their right digests. Who has the key is believed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import secrets
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from inferflux.clock import SystemClock
from inferflux.engine.base import ComputedPrompt, PublishedKv
from inferflux.engine.sim.hydration import Hydrator
from inferflux.engine.sim.kv import KvCache, chain
from inferflux.kv.arena import Arena
from inferflux.kv.digests import block_digest, prompt_digest
from inferflux.kv.shm import ArenaServer
from inferflux.tickets import Issuer, KvTicket, TicketBook, sign, verify
from inferflux.types import ModelFingerprint, PrefilledPrompt, RequestContext, SignedTicket
from inferflux.worker.sources import TicketGate

BLOCK_SIZE, SLOT_BYTES = 16, 16 * 64
ARENA_BYTES = 1 << 16  # few slots, so that they are soon used again
FINGERPRINT = ModelFingerprint("ab" * 32, "float32", "sim-1", BLOCK_SIZE)
KEY, MODEL_KEY = secrets.token_bytes(32), secrets.token_bytes(32)
CLEAN = "clean"


@dataclass(slots=True)
class Case:
    """One transfer, as far as it got. Mutations change it on its way."""

    rng: random.Random
    world: World
    context: RequestContext
    prompt: ComputedPrompt
    signed: SignedTicket
    gate: TicketGate

    @property
    def ticket(self) -> KvTicket:
        return verify(self.signed, KEY)

    def sign_again(self, **wrong: object) -> None:
        """Present a ticket that says something else and yet is signed: the prefill worker itself went wrong."""
        self.signed = sign(replace(self.ticket, **wrong), KEY)  # type: ignore[arg-type]


class World:
    """A prefill worker's arena and book, and a decode worker's gate and hydration, in one process."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.rng = rng
        self.arena = Arena.create(ARENA_BYTES)
        self.arena.format(SLOT_BYTES)
        self.arena.seal()
        self.server = ArenaServer(self.arena, folder / "arena.sock", "inc-1")
        issuer = Issuer("prefill-0", "inc-1", FINGERPRINT, str(folder / "arena.sock"), "host", KEY)
        self.book = TicketBook(self.arena, SystemClock(), issuer)
        self.kv = KvCache(16, BLOCK_SIZE, SLOT_BYTES, MODEL_KEY)
        self.hydrator = Hydrator(self.kv, BLOCK_SIZE, SLOT_BYTES)
        self._numbers = iter(range(1 << 30))

    @classmethod
    @asynccontextmanager
    async def running(cls, rng: random.Random) -> AsyncIterator[World]:
        """Open it."""
        with tempfile.TemporaryDirectory(prefix="ifx-", dir="/tmp") as folder:
            world = cls(Path(folder), rng)
            await world.server.start()
            try:
                yield world
            finally:
                world.hydrator.close()
                await world.server.close()
                world.arena.close()

    def publish(self, salt: str) -> ComputedPrompt:
        """Compute a prompt and put its blocks into the arena."""
        tokens = [self.rng.randrange(50_000) for _ in range(self.rng.randrange(17, 64))]
        num_blocks = -(-len(tokens) // BLOCK_SIZE)
        blocks = range(8, 8 + num_blocks)
        self.kv.clear(blocks[-1])
        self.kv.write(blocks, 0, chain(MODEL_KEY, salt, tokens))
        slots = self.arena.allocate(num_blocks)
        for slot, block in zip(slots, blocks, strict=True):
            self.arena.slot(slot)[:] = self.kv.block(block)
        self.arena.publish(slots)
        digests = tuple(block_digest((self.arena.slot(slot),)) for slot in slots)
        kv = PublishedKv(tuple(slots), digests, len(tokens))
        return ComputedPrompt(prompt_digest(tokens), len(tokens), (1,), kv)

    def case(self) -> Case:
        """Begin a transfer that is right so far."""
        context = RequestContext(f"req-{next(self._numbers)}", tenant=self.rng.choice(("acme", "rival")))
        prompt = self.publish(context.tenant)
        signed = self.book.issue(context, "session", prompt)
        return Case(self.rng, self, context, prompt, signed, TicketGate(KEY, FINGERPRINT))

    async def serve(self, case: Case) -> str:
        """Read the blocks as a decode worker does; returns `served`, or why not."""
        prompt = case.prompt
        offered = PrefilledPrompt(prompt.prompt_digest, prompt.num_prompt_tokens, (1,), case.signed)
        sources, refused = case.gate.admit(case.context, [offered])
        if refused:
            return refused[0].reason
        num_blocks = -(-prompt.num_prompt_tokens // BLOCK_SIZE)
        read = self.hydrator._load, sources[0], prompt.num_prompt_tokens, tuple(range(num_blocks)), 0
        report = await asyncio.to_thread(*read)  # the arena's server runs on this loop
        return "served" if report.result == "committed" else report.reason

    def end(self, case: Case) -> None:
        """Give everything back."""
        live = [record.ticket_id for record in self.book.list()]
        self.book.release(live)
        if self.arena.num_free != self.arena.num_slots:
            raise AssertionError(f"{self.arena.num_slots - self.arena.num_free} slots leaked")


Mutation = Callable[[Case], None]


def flip_slot(case: Case) -> None:
    """A bit of the arena flips after the digests were taken."""
    slot = case.world.arena.slot(case.rng.choice(case.ticket.slots))
    slot[case.rng.randrange(SLOT_BYTES)] ^= 1 << case.rng.randrange(8)


def flip_ticket(case: Case) -> None:
    """A bit of the signed ticket flips on its way."""
    payload = bytearray(case.signed.payload)
    payload[case.rng.randrange(len(payload))] ^= 1 << case.rng.randrange(8)
    case.signed = replace(case.signed, payload=bytes(payload))


def flip_mac(case: Case) -> None:
    """A bit of the signature flips."""
    mac = bytearray(case.signed.mac)
    mac[case.rng.randrange(len(mac))] ^= 1 << case.rng.randrange(8)
    case.signed = replace(case.signed, mac=bytes(mac))


def cut_ticket(case: Case) -> None:
    """The ticket loses its end."""
    case.signed = replace(case.signed, payload=case.signed.payload[: case.rng.randrange(len(case.signed.payload))])


def free_slots(case: Case) -> None:
    """The ticket ended before it was read; its bytes are still there."""
    case.world.book.release([case.ticket.ticket_id])


def reuse_slots(case: Case) -> None:
    """The ticket ended, and its slots hold another prompt, maybe another tenant's."""
    ticket, arena = case.ticket, case.world.arena
    free_slots(case)
    while True:
        other = case.world.publish("rival")
        case.world.book.issue(RequestContext("req-other", tenant="rival"), "session", other)
        if other.kv is None or set(other.kv.slots) & set(ticket.slots) or arena.num_free < 4:
            return


def stale_generation(case: Case) -> None:
    """The ticket names an earlier life of a slot."""
    generations = list(case.ticket.generations)
    generations[case.rng.randrange(len(generations))] += case.rng.choice((1, 2, 7))
    case.sign_again(generations=tuple(generations))


def reused_under_same_generation(case: Case) -> None:
    """The slot's bytes are another prompt's and nothing but the digest says so."""
    ticket, other = case.ticket, case.world.publish("rival")
    assert other.kv is not None
    case.world.arena.slot(ticket.slots[0])[:] = case.world.arena.slot(other.kv.slots[0])
    case.world.arena.free(other.kv.slots)


def other_tenant(case: Case) -> None:
    """Another tenant presents the ticket."""
    case.context = replace(case.context, tenant="thief")


def other_request(case: Case) -> None:
    """Another request presents the ticket."""
    case.context = replace(case.context, request_id="req-replayed")


def other_prompt(case: Case) -> None:
    """The ticket is another prompt's."""
    case.prompt = replace(case.prompt, prompt_digest=secrets.token_bytes(16))


def other_reader(**wrong: object) -> Mutation:
    """Make the decode worker another one."""

    def mutate(case: Case) -> None:
        case.gate = TicketGate(KEY, replace(FINGERPRINT, **wrong))  # type: ignore[arg-type]

    return mutate


def other_key(case: Case) -> None:
    """The ticket is another cluster's."""
    case.signed = sign(case.ticket, secrets.token_bytes(32))


def other_start(case: Case) -> None:
    """The prefill worker was started anew."""
    case.sign_again(incarnation="inc-0")


def missing_block(case: Case) -> None:
    """The last block is not there."""
    ticket = case.ticket
    num = len(ticket.slots) - 1
    case.sign_again(
        slots=ticket.slots[:num],
        generations=ticket.generations[:num],
        digests=ticket.digests[:num],
        num_tokens=min(ticket.num_tokens, num * BLOCK_SIZE),
    )


def missing_digest(case: Case) -> None:
    """A block has no digest."""
    case.sign_again(digests=case.ticket.digests[:-1])


def swapped_slots(case: Case) -> None:
    """Two blocks changed places."""
    first, second, *rest = case.ticket.slots
    case.sign_again(slots=(second, first, *rest))


def swapped_digests(case: Case) -> None:
    """Two digests changed places."""
    first, second, *rest = case.ticket.digests
    case.sign_again(digests=(second, first, *rest))


def repeated_slot(case: Case) -> None:
    """A block stands in for another one."""
    slots = case.ticket.slots
    case.sign_again(slots=(slots[-1], *slots[1:]))


def far_slot(case: Case) -> None:
    """A slot is not in the arena."""
    case.sign_again(slots=(case.rng.choice((1 << 16, 1 << 31)), *case.ticket.slots[1:]))


def other_slot_bytes(case: Case) -> None:
    """Blocks have another size."""
    case.sign_again(slot_bytes=case.rng.choice((SLOT_BYTES // 2, SLOT_BYTES * 2)))


def other_length(case: Case) -> None:
    """The ticket is for fewer tokens than the prompt has."""
    case.sign_again(num_tokens=case.ticket.num_tokens - 1)


MUTATIONS: dict[str, Mutation] = {
    "bit flip in a block": flip_slot,
    "bit flip in the ticket": flip_ticket,
    "bit flip in the signature": flip_mac,
    "truncated ticket": cut_ticket,
    "slots freed": free_slots,
    "slots reused": reuse_slots,
    "stale generation": stale_generation,
    "other bytes under the same generation": reused_under_same_generation,
    "other tenant": other_tenant,
    "other request": other_request,
    "other prompt": other_prompt,
    "other layout": other_reader(layout="sim-2"),
    "other dtype": other_reader(dtype="bfloat16"),
    "other model revision": other_reader(weights_digest="cd" * 32),
    "other block size": other_reader(block_size=32),
    "other key": other_key,
    "other start of the worker": other_start,
    "missing block": missing_block,
    "missing digest": missing_digest,
    "blocks swapped": swapped_slots,
    "digests swapped": swapped_digests,
    "block repeated": repeated_slot,
    "slot out of range": far_slot,
    "other block bytes": other_slot_bytes,
    "other length": other_length,
}


async def run(num_cases: int, seed: int) -> Counter[tuple[str, str]]:
    """Try `num_cases` wrong transfers, all kinds in turn, and as many right ones; counts (kind, outcome)."""
    rng = random.Random(seed)
    outcomes: Counter[tuple[str, str]] = Counter()
    names = list(MUTATIONS)
    async with World.running(rng) as world:
        for i in range(num_cases):
            for name in (names[i % len(names)], CLEAN):
                case = world.case()
                if name != CLEAN:
                    MUTATIONS[name](case)
                try:
                    outcome = await world.serve(case)
                except Exception as e:  # noqa: BLE001 - not served, but nothing that may happen either
                    outcome = f"raised {type(e).__name__}"
                outcomes[name, outcome] += 1
                world.end(case)
    return outcomes


def faults(outcomes: Counter[tuple[str, str]]) -> tuple[int, int]:
    """Count the wrong transfers that were served or raised what they should not, and the right ones not served."""
    bad = {o for _, o in outcomes if o == "served" or o.startswith("raised")}
    served = sum(n for (name, outcome), n in outcomes.items() if name != CLEAN and outcome in bad)
    alarms = sum(n for (name, outcome), n in outcomes.items() if name == CLEAN and outcome != "served")
    return served, alarms


def main(argv: list[str]) -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args(argv)
    outcomes = asyncio.run(run(chosen.cases, chosen.seed))
    for (name, outcome), n in sorted(outcomes.items()):
        sys.stdout.write(f"{name:40} {outcome:12} {n:6}\n")
    served, alarms = faults(outcomes)
    sys.stdout.write(f"{chosen.cases} corruptions: {served} served; {chosen.cases} clean transfers: {alarms} alarms\n")
    return 1 if served or alarms else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
