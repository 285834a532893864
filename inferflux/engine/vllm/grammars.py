"""Which grammars the engine may have: those that a child has compiled within limits. See `trial` for that child.

vLLM compiles what a client has written in its event loop and in its engine core; a grammar that takes minutes or all
memory would take both away from everybody. So each is tried first, and the verdicts are remembered.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import signal
import socket
from collections import OrderedDict
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from vllm.v1.structured_output import backend_guidance
from vllm.v1.structured_output.backend_types import StructuredOutputOptions
from vllm.v1.structured_output.request import get_structured_output_key

from inferflux.engine.options import MIB
from inferflux.engine.vllm import trial
from inferflux.errors import InvalidRequest, Unavailable, WorkerLost

if TYPE_CHECKING:
    from pathlib import Path

    from inferflux.engine.options import GrammarLimits

BACKEND = "guidance"
"""One for all requests: vLLM's `auto` compiles everything with whatever its first request needed."""
MAX_VERDICTS = 4096
MAX_TRIALS = 2
# guess: what a tokenizer takes to load where all cores are busy; the trial itself is bounded by its limits.
WAIT_S = 60.0
NAMES = {
    StructuredOutputOptions.JSON: "the JSON schema",
    StructuredOutputOptions.JSON_OBJECT: "json_object",
    StructuredOutputOptions.REGEX: "the regular expression",
    StructuredOutputOptions.GRAMMAR: "the grammar",
    StructuredOutputOptions.CHOICE: "the choice",
}


class Grammars:
    """Admits grammars. Make it before the process has threads, close it at the end; safe to call concurrently."""

    def __init__(self, model_dir: Path, limits: GrammarLimits) -> None:
        self._limits = limits
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Forked, not spawned: it shares what this process has imported.
        context = multiprocessing.get_context("fork")
        self._process = context.Process(
            target=trial.serve, args=(theirs, str(model_dir), limits), name="grammars", daemon=True
        )
        self._process.start()
        theirs.close()
        self._verdicts: OrderedDict[bytes, asyncio.Task[str]] = OrderedDict()
        self._slots = asyncio.Semaphore(MAX_TRIALS)
        # It would compile the grammar once more, in the event loop.
        backend_guidance.validate_guidance_grammar = lambda *_, **__: None

    def close(self) -> None:
        """End the process. Idempotent."""
        for task in self._verdicts.values():
            task.cancel()
        if self._orders.fileno() >= 0:
            self._orders.shutdown(socket.SHUT_RDWR)  # whatever other forks of this process hold of it
            self._orders.close()
            self._process.join()

    async def admit(self, params: Any) -> None:
        """Return if the engine may have a request's structured outputs (None: it has none).

        Raises InvalidRequest with the reason, Unavailable when there is no verdict in time, WorkerLost when there will
        never be one.
        """
        if params is None or params.all_constraints_none():
            return
        kind, spec = get_structured_output_key(params)
        if kind not in NAMES:
            raise InvalidRequest(f"structured outputs of the kind {kind.name.lower()} are not offered")
        # Shielded: a trial goes on, and keeps its slot, when the client that wanted it has left.
        if reason := await asyncio.shield(self._verdict(kind, spec)):
            raise InvalidRequest(f"{NAMES[kind]} can't be used: {reason}")

    def _verdict(self, kind: StructuredOutputOptions, spec: str) -> asyncio.Task[str]:
        """One trial for all that ask for the same grammar; a trial without verdict is forgotten."""
        key = blake2b(f"{kind.value} {spec}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
        task = self._verdicts.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._verdicts[key] = asyncio.create_task(self._try(kind, spec), name="grammar")
        self._verdicts.move_to_end(key)
        while len(self._verdicts) > MAX_VERDICTS and next(iter(self._verdicts.values())).done():
            self._verdicts.popitem(last=False)
        return task

    async def _try(self, kind: StructuredOutputOptions, spec: str) -> str:
        """Return why a grammar can't be used, empty if it can."""
        order = json.dumps({"kind": kind.value, "spec": spec}).encode()
        async with self._slots:
            try:
                async with asyncio.timeout(WAIT_S):
                    said = await self._ask(order)
            except TimeoutError as e:
                raise Unavailable(f"no verdict on {NAMES[kind]} within {WAIT_S:g} s", retry_after_s=1) from e
            except OSError as e:
                raise WorkerLost("the process that tries grammars is gone") from e
        if not said:
            raise WorkerLost("the process that tries grammars is gone")
        return self._reason(json.loads(said))

    async def _ask(self, order: bytes) -> bytes:
        """Have a child try a grammar; returns the first line that is said about it."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._orders, [b"!"], [theirs.fileno()])
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            writer.write(order)
            writer.write_eof()
            return (await reader.read()).partition(b"\n")[0]
        finally:
            writer.close()

    def _reason(self, said: dict[str, Any]) -> str:
        if "refusal" in said:
            return str(said["refusal"])
        limits = self._limits
        if said["died"] in (-signal.SIGXCPU, -signal.SIGKILL):
            return f"it takes more than {limits.cpu_s} s to compile, the limit is {limits.cpu_s} s of CPU time"
        if said["died"] in (trial.OUT_OF_MEMORY, -signal.SIGABRT):
            return f"it takes more memory to compile than the limit of {limits.memory_bytes // MIB} MiB"
        return "it is nested too deeply to be compiled"
