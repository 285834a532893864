"""What each request must be answered: the same request where nothing goes wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from inferflux.engine.options import MIB, EngineOptions
from inferflux.engine.sim import SimEngine
from inferflux.engine.sim import profile as profiles
from inferflux.types import HttpCall, RequestContext, Role
from tests.chaos.client import Clients, Verdict
from tests.chaos.transcript import Transcript, of_document, of_stream
from tests.chaos.workload import Ask


class Reference(Protocol):
    """Knows the answers."""

    async def start(self) -> None: ...

    async def answer(self, ask: Ask) -> Transcript: ...

    async def close(self) -> None: ...


class SimReference:
    """An engine of its own in this process: one worker, no cluster, nothing that could fail.

    `salts`: of each tenant; its tokens depend on it, so an answer with another tenant's KV is another answer.
    """

    def __init__(self, model: str, salts: Sequence[str], profile: Path, folder: Path) -> None:
        self._salts = salts
        fast = {**json.loads(profile.read_text()), "step_ms": 0, "step_ms_per_sequence": 0, "prefill_ms_per_token": 0}
        path = folder / "reference_profile.json"
        path.write_text(json.dumps(fast))
        profiles.load(path)
        options = EngineOptions(model, Role.DECODE, kv_cache_bytes=256 * MIB, sim_profile=path)
        self._engine = SimEngine(options, None)

    async def start(self) -> None:
        """Start the engine."""
        await self._engine.start()

    async def answer(self, ask: Ask) -> Transcript:
        """Compute what the answer must be."""
        context = RequestContext(f"reference-{ask.number}", cache_salt=self._salts[ask.tenant], created_s=1)
        call = HttpCall("POST", ask.path, json.dumps(ask.body).encode())
        data = b"".join([frame.data async for frame in self._engine.generate(context, call)])
        return of_stream(data) if ask.is_streamed else of_document(data)

    async def close(self) -> None:
        """Stop the engine."""
        await self._engine.close()


class ReplayReference:
    """The cluster itself, once nothing goes wrong any more, with one request at a time."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients

    async def start(self) -> None:
        """Nothing to start."""

    async def answer(self, ask: Ask) -> Transcript:
        """Ask again."""
        outcome = await self._clients.ask(replace(ask, twin=-1), 0)
        if outcome.verdict is not Verdict.OK:
            raise AssertionError(f"the undisturbed run of {ask.mode} failed: {outcome.verdict} {outcome.detail}")
        return outcome.transcript

    async def close(self) -> None:
        """Nothing to stop."""
