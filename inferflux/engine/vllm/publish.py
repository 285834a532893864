"""Prefill's half of the connector: which finished blocks go into which slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.request import RequestStatus

from inferflux import failpoints
from inferflux.engine.vllm import transfer
from inferflux.errors import ArenaFull
from inferflux.kv import blocks

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from inferflux.kv.arena import Arena


@dataclass(frozen=True, slots=True)
class Save:
    """Blocks to copy out, slot by slot."""

    block_ids: tuple[int, ...]
    slots: tuple[int, ...]


@dataclass(slots=True)
class Publication:
    """A prompt on its way into the arena. The first `num_shared` of its slots had their blocks before."""

    slots: tuple[int, ...]
    num_prompt_tokens: int
    num_shared: int
    num_saved: int

    @property
    def new_slots(self) -> tuple[int, ...]:
        return self.slots[self.num_shared :]

    @property
    def is_complete(self) -> bool:
        return self.num_saved == len(self.slots)


class Publisher:
    """Reserves slots when a prompt is first scheduled and fills them as the scheduler completes its blocks."""

    def __init__(self, arena: Arena, block_size: int) -> None:
        self._arena = arena
        self._block_size = block_size
        self._publications: dict[str, Publication] = {}

    def plan(self, step: SchedulerOutput) -> list[Save]:
        """Blocks that this step completes."""
        for request in step.scheduled_new_reqs:
            extra = request.sampling_params.extra_args if request.sampling_params else None
            params = (extra or {}).get(transfer.PARAMS) or {}
            if params.get(transfer.PUBLISH):
                self._begin(request.req_id, request.prompt_len, tuple(params.get(transfer.SHARED, ())))
        cached = step.scheduled_cached_reqs
        for request_id in cached.resumed_req_ids & self._publications.keys():
            publication = self._publications[request_id]
            publication.num_saved = publication.num_shared  # preempted: its blocks are computed again
        progress = [(r.req_id, r.num_computed_tokens) for r in step.scheduled_new_reqs]
        progress += zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        saves = [self._advance(step, request_id, num_computed) for request_id, num_computed in progress]
        return [save for save in saves if save is not None]

    def finish(self, request: Request) -> tuple[int, ...] | None:
        """Hand the slots of a finished request over, or free those it filled. All ranks have copied by now."""
        publication = self._publications.pop(request.request_id, None)
        if publication is None:
            return None
        if request.status == RequestStatus.FINISHED_ABORTED or not publication.is_complete:
            self._arena.free(publication.new_slots)
            return None
        for slot in publication.new_slots:
            self._arena.set_digest(slot, blocks.slot_digest(self._arena.slot(slot), self._arena.num_pieces))
        self._arena.publish(publication.new_slots)
        if failpoints.ON:
            failpoints.hit("ticket.published")
        return publication.slots

    def _begin(self, request_id: str, num_prompt_tokens: int, shared: tuple[int, ...]) -> None:
        if request_id in self._publications:
            return
        try:
            new = self._arena.allocate(-(-num_prompt_tokens // self._block_size) - len(shared))
        except ArenaFull:
            return  # the answer carries no ticket; decode computes the prompt
        for slot in new:
            blocks.clear(self._arena.slot(slot), self._arena.num_pieces)
        if failpoints.ON:
            failpoints.hit("arena.allocated")
        self._publications[request_id] = Publication(shared + new, num_prompt_tokens, len(shared), len(shared))

    def _advance(self, step: SchedulerOutput, request_id: str, num_computed: int) -> Save | None:
        publication = self._publications.get(request_id)
        if publication is None or publication.is_complete:
            return None
        num_after = num_computed + step.num_scheduled_tokens[request_id]
        is_last = num_after >= publication.num_prompt_tokens
        upto = len(publication.slots) if is_last else num_after // self._block_size
        start = publication.num_saved
        if upto <= start:
            return None
        publication.num_saved = upto
        block_ids = step.kv_connector_block_state.get_block_ids(request_id)[0]
        return Save(tuple(block_ids[start:upto]), publication.slots[start:upto])
