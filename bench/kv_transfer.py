"""How fast KV blocks get from one worker to another, for 1 to 256 MB, each transport in the same run.

    python -m bench.kv_transfer [--rounds 3] [--sizes 1,4,16,64,256]

memcpy         one copy from memory to memory, no digest: what the machine can do
publish        our copy of blocks from a prefill worker's paged cache into its arena, with digests
shm, nixl      our copy from the arena of another process into a paged cache, digests checked
connector      what vLLM's NixlConnector does: its agent's configuration, one descriptor per layer and block,
               prepared lists, one read into the paged cache, no digest. Its NIXL calls, not its scheduler, which only
               looks for finished reads between engine steps.

/tcp is what hosts without RDMA have, /local lets UCX copy within the host. Each line is measured in fresh processes;
the best of all rounds counts, since a machine's other tenants only ever slow things down.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from inferflux.kv import nixl
from inferflux.kv.arena import Arena, ArenaReader, Bytes
from inferflux.kv.blocks import BlockShape, Part, slot_digest
from inferflux.kv.transport import Reader, copy_blocks
from inferflux.types import NixlPeer

# Llama 3.2 1B in bfloat16, 32 tokens a block: 1 MiB of KV in 16 layers of 8 heads.
NUM_LAYERS, NUM_HEADS, LAYER_BYTES = 16, 8, 64 << 10
BLOCK_BYTES = NUM_LAYERS * LAYER_BYTES
SHAPE = BlockShape(NUM_LAYERS, NUM_HEADS, LAYER_BYTES // NUM_HEADS)
WHOLE = Part.whole(SHAPE)
MIB = 1 << 20
LOCAL, TCP = {}, {"UCX_TLS": "tcp,self"}
LINES: dict[str, tuple[str, dict[str, str]]] = {
    "memcpy": ("memcpy", LOCAL),
    "publish": ("publish", LOCAL),
    "shm": ("shm", LOCAL),
    "nixl/tcp": ("nixl", TCP),
    "connector/tcp": ("connector", TCP),
    "nixl/local": ("nixl", LOCAL),
    "connector/local": ("connector", LOCAL),
}
GOALS = (
    ("publish", "memcpy", 0.6),
    ("shm", "memcpy", 0.6),
    ("nixl/tcp", "connector/tcp", 1.0),
    ("nixl/local", "connector/local", 1.0),
)
GOAL_MIB = 64
Layers = list[Bytes]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", default="1,4,16,64,256", help="in MiB")
    parser.add_argument("--only", default="", help="lines to measure, separated by commas")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--own", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = [int(size) for size in args.sizes.split(",")]
    if args.own:
        own(args.own, max(sizes))
    elif args.measure:
        print(json.dumps(MEASURE[args.measure](sizes)))
    else:
        report(sizes, run(args.rounds, args.sizes, args.only.split(",") if args.only else list(LINES)))
    return 0


# --- the run ----------------------------------------------------------------------------------------------------------


def run(rounds: int, sizes: str, lines: list[str]) -> dict[str, dict[int, float]]:
    """Seconds by line and size, the best of all rounds; rounds take turns, so that all see the same machine."""
    best: dict[str, dict[int, float]] = {line: {} for line in lines}
    for _ in range(rounds):
        for line in lines:
            what, env = LINES[line]
            command = [sys.executable, "-m", "bench.kv_transfer", "--measure", what, "--sizes", sizes]
            done = subprocess.run(command, env=os.environ | env, stdout=subprocess.PIPE, text=True, check=True)
            for size, seconds in json.loads(done.stdout).items():
                best[line][int(size)] = min(seconds, best[line].get(int(size), seconds))
    return best


def report(sizes: list[int], seconds: dict[str, dict[int, float]]) -> None:
    speed = {line: {size: size * MIB / s / 1e9 for size, s in by_size.items()} for line, by_size in seconds.items()}
    print(f"{'':<16}" + "".join(f"{f'{size} MB':>20}" for size in sizes))
    for line, by_size in seconds.items():
        cells = (f"{by_size[size] * 1e3:.2f} ms {speed[line][size]:5.2f} GB/s" for size in sizes)
        print(f"{line:<16}" + "".join(f"{cell:>20}" for cell in cells))
    size = GOAL_MIB if GOAL_MIB in sizes else max(sizes)
    ratios = {
        f"{ours} to {theirs}": {"ratio": round(speed[ours][size] / speed[theirs][size], 2), "goal": goal}
        for ours, theirs, goal in GOALS
        if ours in speed and theirs in speed
    }
    for name, ratio in ratios.items():
        print(f"{name} at {size} MB: {ratio['ratio']} (goal {ratio['goal']})")
    print(json.dumps({"seconds": seconds, "ratios": ratios, "at_mib": size}))


# --- one line, in a process of its own --------------------------------------------------------------------------------


def best_of(act: Callable[[int], object], sizes: list[int], repeat: int = 4) -> dict[int, float]:
    """Seconds of `act(blocks)` by size in MiB; the first time warms up."""
    act(max(sizes))
    return {size: min(_timed(act, size) for _ in range(repeat)) for size in sizes}


def _timed(act: Callable[[int], object], size: int) -> float:
    started_at = time.perf_counter()
    act(size)
    return time.perf_counter() - started_at


def memcpy(sizes: list[int]) -> dict[int, float]:
    source, target = (np.ones((max(sizes), BLOCK_BYTES), np.uint8) for _ in range(2))
    return best_of(lambda n: np.copyto(target[:n], source[:n]), sizes)


def publish(sizes: list[int]) -> dict[int, float]:
    layers, arena = paged_cache(max(sizes), fill=1), new_arena(max(sizes))
    return best_of(lambda n: [publish_one(layers, arena, i) for i in range(n)], sizes)


def publish_one(layers: Layers, arena: Arena, i: int) -> None:
    """What a prefill engine does with a finished block."""
    slot = arena.slot(i)
    WHOLE.copy_out([layer[i] for layer in layers], slot)
    arena.set_digest(i, slot_digest(slot, SHAPE.num_pieces))


def shm(sizes: list[int]) -> dict[int, float]:
    with owner("arena", sizes) as told:
        fd = os.open(f"/proc/{told['pid']}/fd/{told['fd']}", os.O_RDONLY)
        return hydrated(ArenaReader.open(fd), told, sizes)


def through_nixl(sizes: list[int]) -> dict[int, float]:
    with owner("arena", sizes) as told:
        peer = NixlPeer(bytes.fromhex(told["agent"]), told["address"], told["num_slots"], SHAPE.slot_bytes)
        return hydrated(nixl.NixlReader(peer), told, sizes)


def hydrated(reader: Reader, told: dict[str, Any], sizes: list[int]) -> dict[int, float]:
    """What a decode worker does with a ticket."""
    layers, digests = paged_cache(max(sizes)), [bytes.fromhex(digest) for digest in told["digests"]]

    def read(n: int) -> None:
        slots = tuple(range(n))
        copy_blocks(
            reader, slots, (0,) * n, digests[:n], lambda i, slot: WHOLE.copy_in(slot, [layer[i] for layer in layers])
        )

    return best_of(read, sizes)


def connector(sizes: list[int]) -> dict[int, float]:
    """One descriptor per layer and block, as NixlConnector prepares them; a request's blocks are picked by index."""
    num_blocks = max(sizes)
    with owner("cache", sizes) as told:
        agent, layers = connector_agent(), paged_cache(num_blocks)
        agent.register_memory([(layer.ctypes.data, layer.nbytes, 0, "") for layer in layers], "DRAM")
        peer = agent.add_remote_agent(bytes.fromhex(told["agent"]))
        local = agent.prep_xfer_dlist(
            "NIXL_INIT_AGENT", descriptors(agent, [x.ctypes.data for x in layers], num_blocks)
        )
        remote = agent.prep_xfer_dlist(peer, descriptors(agent, told["addresses"], num_blocks))

        def read(n: int) -> None:
            ids = (np.arange(NUM_LAYERS)[:, None] * num_blocks + np.arange(n)).reshape(-1)
            handle = agent.make_prepped_xfer("READ", local, ids, remote, ids, notif_msg=b"done")
            agent.transfer(handle)
            while (state := agent.check_xfer_state(handle)) == "PROC":
                time.sleep(nixl.READER_POLL_S)
            assert state == "DONE", state
            agent.release_xfer_handle(handle)

        seconds = best_of(read, sizes)
        assert all((layer == 1).all() for layer in layers)
        return seconds


def connector_agent() -> Any:
    """As vLLM 0.32 makes it by default, a busy progress thread included."""
    api = nixl._api()  # noqa: SLF001 - the same package, set up the same way
    return api.nixl_agent(f"connector-{os.getpid()}", api.nixl_agent_config(num_threads=4, capture_telemetry=True))


def descriptors(agent: Any, addresses: list[int], num_blocks: int) -> Any:
    rows = [(base + i * LAYER_BYTES, LAYER_BYTES, 0) for base in addresses for i in range(num_blocks)]
    return agent.get_xfer_descs(np.array(rows, np.uint64), "DRAM")


def paged_cache(num_blocks: int, fill: int = 0) -> Layers:
    """Each layer's blocks, touched, in huge pages and on page borders as in our workers.

    16 bytes behind a border, where numpy puts them, a copy from a page border takes three times as long: each load
    looks to the processor as if it depended on the store before.
    """
    memory = mmap.mmap(-1, NUM_LAYERS * num_blocks * LAYER_BYTES)
    memory.madvise(mmap.MADV_HUGEPAGE)
    cache = np.frombuffer(memory, np.uint8).reshape(NUM_LAYERS, num_blocks, LAYER_BYTES)
    cache[:] = fill
    return list(cache)


def new_arena(num_blocks: int) -> Arena:
    arena = Arena.create((num_blocks + 1) * (SHAPE.slot_bytes + 4096))
    arena.format(SHAPE.slot_bytes, SHAPE.num_pieces)
    return arena


MEASURE = {"memcpy": memcpy, "publish": publish, "shm": shm, "nixl": through_nixl, "connector": connector}


# --- the process that owns the blocks ---------------------------------------------------------------------------------


@contextmanager
def owner(what: str, sizes: list[int]) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "bench.kv_transfer", "--own", what, "--sizes", str(max(sizes))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.stdin.close()


def own(what: str, num_blocks: int) -> None:
    """Offer an arena, or a paged cache as NixlConnector does, until stdin ends."""
    layers = paged_cache(num_blocks, fill=1)
    if what == "cache":
        agent = connector_agent()
        agent.register_memory([(layer.ctypes.data, layer.nbytes, 0, "") for layer in layers], "DRAM")
        told = {"agent": agent.get_agent_metadata().hex(), "addresses": [layer.ctypes.data for layer in layers]}
        say_and_wait(told)
        return
    arena = new_arena(num_blocks)
    arena.seal()
    slots = arena.allocate(num_blocks)
    for slot in slots:
        publish_one(layers, arena, slot)
    arena.publish(slots)
    server = nixl.NixlServer(arena, is_busy=lambda: True)
    peer = server.peer()
    say_and_wait(
        {
            "pid": os.getpid(),
            "fd": arena.fd,
            "digests": [arena.digest(slot).hex() for slot in slots],
            "agent": peer.agent.hex(),
            "address": peer.address,
            "num_slots": peer.num_slots,
        }
    )
    server.close()


def say_and_wait(told: dict[str, Any]) -> None:
    print(json.dumps(told), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    sys.exit(main())
