"""A prefill worker's memory without the worker: an arena in a process of its own, offered over shm and nixl.

    python -m tests.support.arena_owner SOCKET

It publishes every slot of its arena, prints one JSON line that says how to read them, and obeys commands on stdin.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from inferflux.cli.pdeathsig import die_with_parent
from inferflux.kv.arena import Arena
from inferflux.kv.digests import block_digest
from inferflux.kv.nixl import NixlServer
from inferflux.kv.shm import ArenaServer
from inferflux.types import ArenaPath, NixlPeer, Transport

REPOSITORY = Path(__file__).parents[2]
INCARNATION = "one"
SLOT_BYTES = 300_000
"""No multiple of a page: slots have gaps."""
NUM_SLOTS = 200
ARENA_BYTES = (NUM_SLOTS + 2) * (SLOT_BYTES + 4096)
STOP_S = 10.0


@dataclass
class ArenaOwner:
    """The owner's process, as the tests see it."""

    process: subprocess.Popen[str]
    slots: tuple[int, ...]
    generations: tuple[int, ...]
    digests: tuple[bytes, ...]
    peer: NixlPeer
    socket_path: str

    def path(self, transport: Transport) -> ArenaPath:
        return ArenaPath(transport, "prefill-0", INCARNATION, self.socket_path, self.peer)

    def tell(self, command: str, *slots: int) -> None:
        """Let it `free` slots, `corrupt` or `refill` them; returns when that is done."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([command, *slots]) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"


@contextmanager
def arena_owner(directory: Path) -> Iterator[ArenaOwner]:
    """Run an owner; it is gone afterwards, whatever happened to it."""
    socket_path = str(directory / "arena.sock")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.arena_owner", socket_path],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent(),  # noqa: PLW1509 - one thread
    )
    assert process.stdout is not None
    try:
        told = json.loads(process.stdout.readline())
        peer = NixlPeer(**{**told["peer"], "agent": bytes.fromhex(told["peer"]["agent"])})
        digests = tuple(map(bytes.fromhex, told["digests"]))
        yield ArenaOwner(process, tuple(told["slots"]), tuple(told["generations"]), digests, peer, socket_path)
    finally:
        process.kill()
        process.communicate(timeout=STOP_S)


async def own(socket_path: str) -> None:
    """Be the owner until stdin ends."""
    arena = Arena.create(ARENA_BYTES)
    arena.format(SLOT_BYTES)
    arena.seal()
    slots = arena.allocate(NUM_SLOTS)
    for slot in slots:
        arena.slot(slot)[:] = np.random.default_rng(slot).integers(0, 256, SLOT_BYTES, np.uint8)
    arena.publish(slots)
    server = NixlServer(arena, is_busy=lambda: True)
    await ArenaServer(arena, socket_path, INCARNATION).start()
    peer = asdict(await asyncio.to_thread(server.peer))
    told = {
        "slots": slots,
        "generations": arena.generations(slots),
        "digests": [block_digest([arena.slot(slot)]).hex() for slot in slots],
        "peer": {**peer, "agent": peer["agent"].hex()},
    }
    say(json.dumps(told))
    while line := await asyncio.to_thread(sys.stdin.readline):
        obey(arena, *json.loads(line))
        say("done")


def obey(arena: Arena, command: str, *slots: int) -> None:
    if command == "free":
        arena.free(slots)
    for slot in slots:
        if command == "corrupt":
            arena.slot(slot)[SLOT_BYTES // 2] ^= 1
        if command == "refill":
            arena.slot(slot)[:] = 0


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(own(sys.argv[1]))
