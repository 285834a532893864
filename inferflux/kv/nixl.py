"""Reading an arena of any host through NIXL: one-sided, by RDMA where UCX finds it, else by TCP or the kernel.

The owner registers its arena with an agent and hands the agent's description to readers (NixlPeer); from there on
readers copy slots, and the slots' generations, without a word to the owner's engine. NIXL's own threads busy-wait, so
there are none: a reader drives its transfer while it waits for it, and the owner drives the far end of emulated reads
(TCP) from a thread that nearly sleeps unless tickets are live.

Agents are made when the first pair needs one, never before a fork: an agent listens on a port, and what UCX exchanges
is neither encrypted nor authenticated. Only a handshake over mutual TLS gives a reader what it needs, but the network
in between must be trusted (docs/architecture.md).
"""

from __future__ import annotations

import importlib
import importlib.util
import mmap
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from inferflux.errors import KvStale, KvUnreachable
from inferflux.kv.arena import PAGE, TABLE, Arena, Bytes, Layout, Slots
from inferflux.types import NixlPeer

# The last is a shim over whichever is installed; it imports torch to find out, which takes seconds.
PACKAGES = ("nixl_cu13", "nixl_cu12", "nixl")
ENVIRONMENT = {
    "NIXL_LOG_LEVEL": "ERROR",  # it would write to stdout
    "UCX_LOG_LEVEL": "error",  # it warns of whatever a dead peer leaves unfinished
    "UCX_RCACHE_MAX_UNRELEASED": "1024",  # unlimited, deregistered memory piles up
}
WINDOW_BYTES = 8 << 20
"""Bytes read at once; two windows make a reader's buffer."""
STALL_S = 2.0
"""A window that takes longer than this will not come."""
READER_POLL_S = 100e-6
OWNER_POLL_S, OWNER_IDLE_S = 200e-6, 10e-3
WARM_S = 5.0
"""How long the owner keeps an ear open after a handshake, for what a reader does without a ticket."""

Region = tuple[int, int]
Take = Callable[[int, Bytes], None]


def is_installed() -> bool:
    """Whether a NIXL package is there; says nothing of whether it works."""
    return any(_is_there(name) for name in PACKAGES)


@cache
def _is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@cache
def _api() -> Any:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in PACKAGES:
        with suppress(ImportError):
            return importlib.import_module(f"{name}._api")
    raise KvUnreachable("no NIXL package can be imported: pip install 'inferflux[nixl]'")


class Agent:
    """One end of transfers, with its port and connections. Safe across threads; no call waits for a peer.

    Make it where it is used: a forked child can't use its parent's.
    """

    def __init__(self) -> None:
        api = _api()
        strict = api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"], sync_mode=strict)
        with _translated("no agent"):
            self._agent = api.nixl_agent(uuid.uuid4().hex, config)

    def register(self, view: Bytes) -> None:
        """Let transfers touch this memory, which must outlive the agent."""
        with _translated("memory can't be registered"):
            self._agent.register_memory([(view.ctypes.data, view.nbytes, 0, "")], "DRAM")

    def describe(self) -> bytes:
        """What peers need to read the registered memory."""
        with _translated("no description"):
            return bytes(self._agent.get_agent_metadata())

    def add(self, description: bytes) -> str:
        """Make a peer known; returns its name."""
        with _translated("the peer's description is not usable"):
            name = self._agent.add_remote_agent(description)
            return name.decode() if isinstance(name, bytes) else str(name)

    def post(self, peer: str, local: Sequence[Region], remote: Sequence[Region]) -> Any:
        """Begin to read `remote` into `local`, region by region (address, bytes)."""
        with _translated(f"peer {peer} can't be read"):
            mine, theirs = (self._agent.get_xfer_descs([(*r, 0) for r in side], "DRAM") for side in (local, remote))
            handle = self._agent.initialize_xfer("READ", mine, theirs, peer)
            self._agent.transfer(handle)
            return handle

    def wait(self, handle: Any, timeout_s: float = STALL_S) -> None:
        """Drive a transfer to its end. Raises KvUnreachable when it fails or takes too long."""
        deadline = time.monotonic() + timeout_s
        try:
            with _translated("the peer is gone"):
                while (state := self._agent.check_xfer_state(handle)) == "PROC":
                    if time.monotonic() > deadline:
                        raise KvUnreachable(f"a read is not done after {timeout_s:g} s")
                    time.sleep(READER_POLL_S)
            if state != "DONE":
                raise KvUnreachable(f"a read ended as {state}")
        finally:
            self.release(handle)

    def release(self, handle: Any) -> None:
        """Forget a transfer, finished or not."""
        with suppress(Exception):  # nothing more can be done about it here
            self._agent.release_xfer_handle(handle)

    def close(self) -> None:
        """Close port and connections. Idempotent."""
        self._agent = None

    def progress(self) -> None:
        """Do what peers have asked for."""
        with _translated("no progress"):
            self._agent.get_new_notifs()


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """NIXL's errors have no base of their own."""
    try:
        yield
    except KvUnreachable:
        raise
    except Exception as e:
        raise KvUnreachable(f"nixl: {what}: {type(e).__name__}") from e


class NixlServer:
    """The owner's side: offers an arena to readers. `is_busy` says whether anybody may be reading now."""

    def __init__(self, arena: Arena, is_busy: Callable[[], bool]) -> None:
        self._arena = arena
        self._is_busy = is_busy
        self._agent: Agent | None = None
        self._peer: NixlPeer | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._warm_until = 0.0
        self._thread = threading.Thread(target=self._serve, name="nixl", daemon=True)

    def peer(self) -> NixlPeer:
        """What a reader needs. The first call makes the agent and takes a second: call it in a thread.

        Raises KvUnreachable.
        """
        with self._lock:
            if self._peer is None:
                self._peer = self._open()
                self._thread.start()
            self._warm_until = time.monotonic() + WARM_S
            return self._peer

    def close(self) -> None:
        """Stop serving. Idempotent."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._agent is not None:
            self._agent.close()

    def _open(self) -> NixlPeer:
        self._agent, memory = Agent(), self._arena.memory
        self._agent.register(memory)
        return NixlPeer(self._agent.describe(), int(memory.ctypes.data), self._arena.num_slots, self._arena.slot_bytes)

    def _serve(self) -> None:
        period_s = OWNER_IDLE_S
        while self._agent is not None and not self._closed.wait(period_s):
            with suppress(KvUnreachable):
                self._agent.progress()
            is_awake = self._is_busy() or time.monotonic() < self._warm_until
            period_s = OWNER_POLL_S if is_awake else OWNER_IDLE_S


class NixlReader:
    """An arena of another process, through two windows that are filled in turn. Implements transport.Reader.

    Each has an agent of its own: only the end of an agent closes its connections.
    """

    def __init__(self, peer: NixlPeer) -> None:
        self._layout = Layout(peer.slot_bytes, peer.num_slots)
        if peer.slot_bytes <= 0 or peer.num_slots <= 0:
            raise KvUnreachable(f"an arena of {peer.num_slots} slots of {peer.slot_bytes} bytes can't be read")
        self._address = peer.address
        self._window = min(max(1, WINDOW_BYTES // self._layout.stride), peer.num_slots)
        self._slots = _aligned(2 * self._window * self._layout.stride).reshape(2, self._window, self._layout.stride)
        self._table = np.zeros(peer.num_slots, TABLE)
        self._agent = Agent()
        self._name = self._agent.add(peer.agent)
        self._agent.register(self._slots.reshape(-1))
        self._agent.register(self._table.view(np.uint8))
        self._lock = threading.Lock()

    @property
    def num_slots(self) -> int:
        return self._layout.num_slots

    @property
    def slot_bytes(self) -> int:
        return self._layout.slot_bytes

    def check(self, slots: Slots, generations: Sequence[int]) -> None:
        """See transport.Reader. Reads the table from the first of the slots to the last."""
        if not slots:
            return
        self._require_inside(slots)
        first, end = min(slots), max(slots) + 1
        with self._lock:
            self._read_table(first, end)
            have = self._table["generation"][list(slots)].tolist()
        for slot, is_now, wanted in zip(slots, have, generations, strict=True):
            if is_now != wanted:
                raise KvStale(f"slot {slot} has generation {is_now}, the ticket says {wanted}")

    def read(self, slots: Slots, take: Take) -> None:
        """See transport.Reader. While one window is taken the next one fills."""
        self._require_inside(slots)
        batches = [slots[i : i + self._window] for i in range(0, len(slots), self._window)]
        with self._lock:
            handle = self._post(batches[0], 0) if batches else None
            for n, batch in enumerate(batches):
                self._agent.wait(handle)
                handle = self._post(batches[n + 1], n + 1) if n + 1 < len(batches) else None
                try:
                    for i in range(len(batch)):
                        take(n * self._window + i, self._slots[n % 2, i, : self._layout.slot_bytes])
                except BaseException:
                    if handle is not None:
                        self._agent.wait(handle)  # it must not write into the window of the next read
                    raise

    def close(self) -> None:
        """Cut the connection, so that nothing writes into the windows any more. Idempotent."""
        with self._lock:
            self._agent.close()

    def _read_table(self, first: int, end: int) -> None:
        begin, size = first * TABLE.itemsize, (end - first) * TABLE.itemsize
        local = (int(self._table.ctypes.data) + begin, size)
        self._agent.wait(self._agent.post(self._name, [local], [(self._address + PAGE + begin, size)]))

    def _post(self, batch: Slots, n: int) -> Any:
        """Begin to fill a window; neighbours in the arena are neighbours there, and read as one region."""
        stride = self._layout.stride
        window = int(self._slots[n % 2].ctypes.data)
        local, remote = [], []
        for begin, end in _runs(batch):
            local.append((window + begin * stride, (end - begin) * stride))
            remote.append((self._address + self._layout.data_at + batch[begin] * stride, (end - begin) * stride))
        return self._agent.post(self._name, local, remote)

    def _require_inside(self, slots: Slots) -> None:
        if slots and not (min(slots) >= 0 and max(slots) < self.num_slots):
            raise KvStale(f"slots {min(slots)}..{max(slots)} are not all in an arena of {self.num_slots}")


def _aligned(num_bytes: int) -> Bytes:
    """Make room on a page border, for network cards and for copies to other borders; touched."""
    room = np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)
    room[:] = 0
    return room


def _runs(slots: Slots) -> list[tuple[int, int]]:
    """Ranges of indexes whose slots follow each other."""
    breaks = [i for i, (a, b) in enumerate(pairwise(slots), 1) if b != a + 1]
    return list(pairwise([0, *breaks, len(slots)]))
