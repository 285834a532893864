"""The Engine contract over the simulated scheduler and application."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256

from inferflux.engine import reference
from inferflux.engine.base import Adapter, Engine, EngineInfo, EngineLoad, KvSource, Prefilled
from inferflux.engine.options import EngineOptions
from inferflux.engine.prefix import Prefixes
from inferflux.engine.sim import profile as profiles
from inferflux.engine.sim.api import App, Plan
from inferflux.engine.sim.blocks import BlockPool
from inferflux.engine.sim.hydration import Hydrator
from inferflux.engine.sim.kv import KvCache, chain
from inferflux.engine.sim.publication import Publication
from inferflux.engine.sim.response import Inbox, Response
from inferflux.engine.sim.scheduler import Scheduler
from inferflux.engine.sim.sequence import Choice, Emitted, Event, Job, Sampling, StopGuard
from inferflux.errors import ConfigError, Conflict, InvalidRequest, NumericsMismatch
from inferflux.kv.arena import Arena
from inferflux.kv.digests import prompt_digest
from inferflux.kv.prefixes import PrefixStore
from inferflux.types import Delivered, End, Frame, HttpAnswer, HttpCall, KvReport, ModelFingerprint, RequestContext

LAYOUT = "sim-1"


class SimEngine(Engine):
    """Deterministic: what a call yields depends on the model's name, the tenant's salt and the call, nothing else."""

    def __init__(self, options: EngineOptions, arena: Arena | None, prefixes: PrefixStore | None = None) -> None:
        self._options = options
        self._arena = arena
        profile = profiles.load(options.sim_profile)
        self._profile = replace(profile, block_size=options.block_size or profile.block_size)
        self._fingerprint = _fingerprint(options, self._profile.block_size)
        self._prefixes = Prefixes(arena, prefixes, self._fingerprint) if arena is not None else None
        self._key = sha256(repr(self._fingerprint).encode()).digest()
        num_blocks = options.kv_cache_bytes // profile.slot_bytes
        if num_blocks < 1:
            raise ConfigError(f"kv_cache_bytes: {options.kv_cache_bytes} is less than a block of {profile.slot_bytes}")
        longest = num_blocks * self._profile.block_size
        self._max_model_len = min(options.max_model_len or profile.max_model_len, longest)
        self._pool = BlockPool(num_blocks)
        self._kv = KvCache(num_blocks, self._profile.block_size, profile.slot_bytes, self._key)
        self._hydrator = Hydrator(self._kv, self._profile.block_size, profile.slot_bytes)
        self._scheduler = Scheduler(self._profile, self._pool, self._kv, self._hydrator, options.max_num_seqs)
        self._app = App(options.model, self._max_model_len, options.role)
        self._adapters: set[tuple[str, str]] = set()
        self._steps: asyncio.Task[None] | None = None

    async def start(self) -> EngineInfo:
        if self._options.cpu_cores:
            os.sched_setaffinity(0, self._options.cpu_cores)  # it computes in this process
        if self._arena is not None:
            self._arena.format(self._profile.slot_bytes)
        self._steps = asyncio.create_task(self._scheduler.run(), name="sim-engine")
        return EngineInfo(
            name="sim",
            model=self._options.model,
            fingerprint=self._fingerprint,
            max_model_len=self._max_model_len,
            max_num_seqs=self._options.max_num_seqs,
            slot_bytes=self._profile.slot_bytes,
            capabilities=self._app.capabilities,
        )

    async def check_numerics(self) -> None:
        if self._options.numerics_reference is None:
            return
        wanted = reference.load(self._options.numerics_reference)
        how = Sampling(max_tokens=len(wanted.greedy_ids), temperature=0)
        inbox = Inbox()
        tokens = await self._run([self._job(RequestContext("numerics"), inbox, wanted.prompt_token_ids, how, 0)], inbox)
        if tokens != wanted.greedy_ids:
            raise NumericsMismatch(f"greedy tokens are {list(tokens)}, the reference says {list(wanted.greedy_ids)}")

    async def prefill(self, context: RequestContext, call: HttpCall) -> Prefilled | HttpAnswer:
        started_at = time.perf_counter()
        plan = self._app.read(call, context)
        if isinstance(plan, HttpAnswer):
            return plan
        inbox, n = Inbox(), plan.sampling.n
        how = replace(plan.sampling, max_tokens=1, n=1, stop=())
        jobs = [self._job(context, inbox, prompt, how, i * n) for i, prompt in enumerate(plan.prompts)]
        publications = [self._publication(context, job) for job in jobs]
        try:
            await self._run(jobs, inbox)
        except BaseException:
            for publication in publications:
                publication.undo()
            raise
        computed = (publication.computed(job) for publication, job in zip(publications, jobs, strict=True))
        return Prefilled(tuple(computed), time.perf_counter() - started_at)

    async def generate(
        self,
        context: RequestContext,
        call: HttpCall,
        sources: Sequence[KvSource] = (),
        delivered: Delivered | None = None,
    ) -> AsyncGenerator[Frame]:
        plan = self._app.read(call, context)
        if isinstance(plan, HttpAnswer):
            yield Frame(plan.head, plan.body, kv=_unneeded(sources), end=End())
            return
        inbox, past = Inbox(), delivered or Delivered()
        jobs = self._jobs(context, inbox, plan)
        response = Response(plan, jobs, past.num_events)
        replayed = _replay(past, jobs, inbox)
        unfinished = [job for job in jobs if not job.is_finished]
        spare = _assign(sources, unfinished)
        try:
            self._submit(unfinished)
            for frame in response.beginning(_unneeded(spare), replayed):
                yield frame
            while not response.is_complete:
                for frame in response.frames(await inbox.take()):
                    yield frame
        finally:
            self._abort(jobs)

    async def load_adapter(self, adapter: Adapter) -> None:
        if len(self._adapters) >= 2 * self._options.max_adapters:  # each may be there twice for a moment
            raise Conflict(
                f"the engine holds {len(self._adapters)} adapters, max_adapters {self._options.max_adapters}"
            )
        self._adapters.add((adapter.name, adapter.digest))
        self._app.adapters.add(adapter.name)

    async def drop_adapter(self, adapter: Adapter, *, is_last: bool) -> None:
        self._adapters.discard((adapter.name, adapter.digest))
        if is_last:
            self._app.adapters.discard(adapter.name)

    def load(self) -> EngineLoad:
        scheduler, pool = self._scheduler, self._pool
        return EngineLoad(
            step=scheduler.step,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_queued_tokens=scheduler.num_queued_tokens,
            num_free_blocks=pool.num_free,
            num_blocks=pool.num_blocks,
            is_alive=scheduler.is_alive,
        )

    async def close(self) -> None:
        if self._steps is not None:
            self._steps.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await self._steps
        self._scheduler.stop()  # a loop that was cancelled before its first turn could not
        self._hydrator.close()

    # Jobs

    def _jobs(self, context: RequestContext, inbox: Inbox, plan: Plan) -> list[Job]:
        how = plan.sampling
        return [self._job(context, inbox, prompt, how, i * how.n) for i, prompt in enumerate(plan.prompts)]

    def _job(
        self, context: RequestContext, inbox: Inbox, prompt: tuple[int, ...], how: Sampling, first_index: int
    ) -> Job:
        room = self._max_model_len - len(prompt)
        natural_end = self._profile.natural_tokens if how.max_tokens is None and not how.ignore_eos else None
        indexes = range(first_index, first_index + how.n)
        return Job(
            prompt=prompt,
            hashes=chain(self._key, context.cache_salt, prompt),
            choices=[Choice(i, how.key(i - first_index), StopGuard(how.stop), list(prompt)) for i in indexes],
            limit=min(how.max_tokens or room, natural_end or room, room),
            natural_end=natural_end,
            may_stop=bool(how.stop),
            priority=context.priority,
            emit=inbox.put,
        )

    def _submit(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self._scheduler.submit(job)

    def _abort(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self._scheduler.abort(job)

    async def _run(self, jobs: Sequence[Job], inbox: Inbox) -> tuple[int, ...]:
        """Run jobs to their end without a response and return their tokens."""
        events: list[Event] = []
        try:
            self._submit(jobs)
            while not all(job.is_finished for job in jobs):
                events += await inbox.take()
        finally:
            self._abort(jobs)
        return tuple(token_id for event in events if isinstance(event, Emitted) for token_id in event.token_ids)

    def _publication(self, context: RequestContext, job: Job) -> Publication:
        if self._arena is None or self._prefixes is None:
            raise ConfigError("prefill needs an arena")
        publication = Publication(self._prefixes, self._arena, self._kv, context.cache_salt, job.prompt)
        job.source, job.publish = publication.source, publication.publish
        return publication


def _fingerprint(options: EngineOptions, block_size: int) -> ModelFingerprint:
    weights = sha256(f"inferflux-sim/{options.model}".encode()).hexdigest()
    return ModelFingerprint(weights, "float32" if options.dtype == "auto" else options.dtype, LAYOUT, block_size)


def _replay(past: Delivered, jobs: Iterable[Job], inbox: Inbox) -> list[Event]:
    """Give choices the tokens that another worker sampled and return what comes of it, as when they were sampled."""
    owners = {choice.index: (job, choice) for job in jobs for choice in job.choices}
    for part in past.tokens:
        if part.index not in owners:
            raise InvalidRequest(f"delivered tokens of choice {part.index}, the call has {len(owners)} choices")
        job, choice = owners[part.index]
        for token_id in part.token_ids:
            if choice.finish_reason:
                raise InvalidRequest(f"delivered tokens of choice {part.index} go on after its end")
            job.add(choice, token_id)
    return inbox.drain()


def _assign(sources: Sequence[KvSource], jobs: Sequence[Job]) -> list[KvSource]:
    """Give each job the source of its prompt; return the sources that no job wants."""
    spare = list(sources)
    for job in jobs:
        digest = prompt_digest(job.prompt)
        job.source = next((source for source in spare if source.prompt_digest == digest), None)
        if job.source is not None:
            spare.remove(job.source)
    return spare


def _unneeded(sources: Iterable[KvSource]) -> tuple[KvReport, ...]:
    return tuple(KvReport(source.ticket_id, "unneeded") for source in sources)
