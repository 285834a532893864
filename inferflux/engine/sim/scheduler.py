"""The step loop: all running sequences advance together, one token each, as in a real engine.

A job waits until all blocks it may ever need are free, so nothing is preempted; then its prompt comes from the prefix
cache, from another worker (`hydration`) or is computed in its first step. Blocks have one owner: the waiting list owns
none, a loading or running job owns its own, and each way out (`_finish`, `abort`, `_fail`) drops them once.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import insort
from typing import cast

from inferflux.engine.base import KvSource
from inferflux.engine.sim.blocks import BlockPool
from inferflux.engine.sim.hydration import Hydrator
from inferflux.engine.sim.kv import KvCache
from inferflux.engine.sim.profile import SimProfile
from inferflux.engine.sim.sequence import Choice, Job
from inferflux.errors import Internal, InvalidRequest, WorkerLost
from inferflux.types import KvReport

logger = logging.getLogger(__name__)


class Scheduler:
    """Runs jobs. Everything but the copying of blocks happens on one event loop."""

    def __init__(
        self, profile: SimProfile, pool: BlockPool, kv: KvCache, hydrator: Hydrator, max_num_seqs: int
    ) -> None:
        self._profile = profile
        self._pool = pool
        self._kv = kv
        self._hydrator = hydrator
        self._max_num_seqs = max_num_seqs
        self._waiting: list[Job] = []
        self._loading: list[Job] = []
        self._running: list[Job] = []
        self._wake = asyncio.Event()
        self.step = 0
        self.is_alive = True

    @property
    def num_running(self) -> int:
        return sum(len(job.choices) for job in self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._loading)

    @property
    def num_queued_tokens(self) -> int:
        return sum(job.num_uncomputed for jobs in (self._waiting, self._loading, self._running) for job in jobs)

    def submit(self, job: Job) -> None:
        """Queue a job; lower priority first, then first come, first served."""
        if not self.is_alive:
            raise WorkerLost("the engine is dead")
        self._require_possible(job)
        job.early = job.early_token
        if job.early is not None:
            job.add(job.choices[0], job.early)
        insort(self._waiting, job, key=lambda waiting: waiting.priority)
        self._wake.set()

    def abort(self, job: Job) -> None:
        """Stop a job and free its blocks (after the copy that may run). Idempotent; finished jobs are ignored."""
        if job in self._loading:
            self._loading.remove(job)
        elif job in self._running:
            self._running.remove(job)
            self._drop(job)
        elif job in self._waiting:
            self._waiting.remove(job)
        self._wake.set()

    async def run(self) -> None:
        """Step for ever. Ends by cancellation, or by a bug: then every job fails and the engine is dead."""
        try:
            while True:
                await self._step()
        except Exception:
            logger.exception("the sim engine's step loop failed")
            raise
        finally:
            self.stop()

    async def _step(self) -> None:
        self._admit()
        if not self._running:
            self._wake.clear()
            await self._wake.wait()
            return
        num_prompt_tokens = sum(job.num_uncomputed for job in self._running)
        await asyncio.sleep(self._profile.step_s(self.num_running, num_prompt_tokens))
        for job in tuple(self._running):
            self._advance(job)
        self.step += 1

    # Admission

    def _admit(self) -> None:
        while self._waiting and self._allocate(self._waiting[0]):
            job = self._waiting.pop(0)
            if job.source is not None and job.source.num_tokens > job.num_cached and job.num_uncomputed:
                self._load(job, job.source)
            else:
                self._start(job)

    def _require_possible(self, job: Job) -> None:
        """Refuse what could never be admitted: it would wait for ever."""
        num_full, num_total = self._num_blocks(job)
        num_needed = num_total + (len(job.choices) - 1) * (num_total - num_full)
        if len(job.choices) > self._max_num_seqs or num_needed > self._pool.num_blocks:
            raise InvalidRequest(
                f"{len(job.choices)} choices with {num_needed} KV blocks, more than the engine's "
                f"{self._max_num_seqs} sequences or {self._pool.num_blocks} blocks"
            )

    def _num_blocks(self, job: Job) -> tuple[int, int]:
        """Blocks that the prompt fills, and all that a choice may need."""
        size = self._profile.block_size
        return len(job.prompt) // size, -(-(len(job.prompt) + job.limit) // size)

    def _allocate(self, job: Job) -> bool:
        """Give a job all blocks it may need: cached ones, one set for its prompt, and each choice's own."""
        num_seqs = self.num_running + sum(len(loading.choices) for loading in self._loading)
        size = self._profile.block_size
        num_full, num_total = self._num_blocks(job)
        cached = self._pool.find(job.hashes[size - 1 :: size])
        num_new = num_total - len(cached) + (len(job.choices) - 1) * (num_total - num_full)
        if num_seqs + len(job.choices) > self._max_num_seqs or not self._pool.can_take(num_new, cached):
            return False
        self._pool.share(cached)
        first, *others = job.choices
        first.blocks = cached + self._pool.take(num_total - len(cached))
        for choice in others:
            self._pool.share(first.blocks[:num_full])
            choice.blocks = first.blocks[:num_full] + self._pool.take(num_total - num_full)
        first.num_computed = job.num_cached = len(cached) * size
        return True

    def _load(self, job: Job, source: KvSource) -> None:
        blocks, first = job.choices[0].blocks, job.num_cached // self._profile.block_size
        self._loading.append(job)
        loading = self._hydrator.load(source, min(source.num_tokens, len(job.prompt)), blocks, first)
        loading.add_done_callback(lambda done: self._end_loading(job, done))

    def _end_loading(self, job: Job, done: asyncio.Future[KvReport]) -> None:
        """Go on with a loaded job, or drop what an aborted one held: until now the copy was writing into it."""
        error = done.exception()
        if job in self._loading and error is None:
            self._loading.remove(job)
            job.has_failed_read = done.result().result != "committed"
            if job.source is not None and not job.has_failed_read:
                job.num_read = job.source.num_tokens - job.num_cached
                job.choices[0].num_computed = job.source.num_tokens
            self._start(job, done.result())
        else:
            self._drop(job)
            if job in self._loading and error is not None:
                self._loading.remove(job)
                job.emit(cast("Exception", error))
        self._wake.set()

    def _start(self, job: Job, report: KvReport | None = None) -> None:
        if job.source is not None:
            job.emit(report or KvReport(job.source.ticket_id, "unneeded"))
        self._running.append(job)

    # One job's step

    def _advance(self, job: Job) -> None:
        if not job.is_computed:
            self._compute_prompt(job)
            if job.early is not None and job.early != self._sample(job, job.choices[0], len(job.prompt)):
                self._fail(job, Internal("prefill's first token does not follow from its KV"))
                return
        # In a resumed job some choices are ahead: those wait, so that events come in the order of an undisturbed one.
        unfinished = [choice for choice in job.choices if not choice.finish_reason]
        num_output = min((choice.num_output for choice in unfinished), default=0)
        for choice in unfinished:
            if choice.num_output == num_output:
                self._advance_choice(job, choice)
        if job.is_finished:
            self._running.remove(job)
            self._drop(job)

    def _compute_prompt(self, job: Job) -> None:
        """Write what of the prompt's KV is missing, publish it, and give every choice its own last block."""
        first, *others = job.choices
        size, num_tokens = self._profile.block_size, len(job.prompt)
        num_full = num_tokens // size
        if first.num_computed <= num_full * size < num_tokens:
            # A published block must not end with what its last holder, maybe another tenant, left in it.
            self._kv.clear(first.blocks[num_full])
        self._kv.write(first.blocks, first.num_computed, job.hashes[first.num_computed :])
        for i in range(num_full):
            self._pool.register(first.blocks[i], self._kv.hash_at(first.blocks, (i + 1) * size - 1))
        job.digest = self._kv.digest(first.blocks, num_tokens)
        for choice in others:
            if num_tokens % size:
                self._kv.copy(first.blocks[num_full], choice.blocks[num_full])
        for choice in job.choices:
            choice.num_computed = num_tokens
        if job.publish is not None:
            job.publish(first.blocks[: -(-num_tokens // size)], num_tokens)
        job.is_computed = True

    def _advance_choice(self, job: Job, choice: Choice) -> None:
        for position in range(choice.num_computed, len(choice.tokens)):
            self._compute_output(choice, position)
        job.add(choice, self._sample(job, choice, len(choice.tokens)))

    def _compute_output(self, choice: Choice, position: int) -> None:
        self._kv.append(choice.blocks, position, choice.tokens[position])
        choice.num_computed = position + 1
        if choice.num_computed % self._profile.block_size == 0:
            block = choice.blocks[position // self._profile.block_size]
            self._pool.register(block, self._kv.hash_at(choice.blocks, position))

    def _sample(self, job: Job, choice: Choice, num_tokens: int) -> int:
        return self._kv.sample(choice.blocks, num_tokens, job.digest, choice.sampling_key)

    # Ends

    def _drop(self, job: Job) -> None:
        for choice in job.choices:
            self._pool.drop(choice.blocks)
            choice.blocks = []

    def _fail(self, job: Job, error: Exception) -> None:
        self.abort(job)
        job.emit(error)

    def stop(self) -> None:
        """Fail every job and take no more. Idempotent."""
        self.is_alive = False
        for job in (*self._waiting, *self._loading, *self._running):
            self._fail(job, WorkerLost("the engine is dead"))
