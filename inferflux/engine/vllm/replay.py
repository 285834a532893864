"""Delivered tokens on their way through vLLM's client once more, so that its application writes its events again.

The application's state (detokenizer, tool and reasoning parsers, counts) comes from reading the same outputs in the
same pieces and order. vLLM merges outputs that pile up and lets prompts of one call overtake each other; here each
output of another worker is handed out alone, when it is its turn.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import Request

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vllm.outputs import RequestOutput
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.output_processor import OutputProcessor

Group = tuple[int, tuple[int, ...]]
"""A turn and the tokens that an output brought then."""


class Turns:
    """The order of all replayed outputs of a call. `num`: how many there are; new ones come after them."""

    def __init__(self) -> None:
        self.num = 0
        self._now = 0
        self._moved = asyncio.Event()

    async def reach(self, turn: int) -> None:
        """Wait until everything before `turn` is written."""
        while self._now < turn:
            await self._moved.wait()

    def end(self, turn: int) -> None:
        """Go on: `turn` is written."""
        self._now = max(self._now, turn + 1)
        self._moved.set()
        self._moved = asyncio.Event()


class ReplayQueue:
    """Where a client of vLLM reads outputs: first those that are written again, then the engine's."""

    def __init__(
        self, queue: RequestOutputCollector, outputs: Iterable[tuple[int, RequestOutput]], turns: Turns
    ) -> None:
        self._queue = queue
        self._outputs = deque(outputs)
        self._turns = turns
        self._turn: int | None = None
        self._is_replaying = True

    @property
    def request_id(self) -> str:
        return self._queue.request_id

    def get_nowait(self) -> RequestOutput | None:
        """The engine's next output, if it is its turn and there is one."""
        return None if self._is_replaying else self._queue.get_nowait()

    async def get(self) -> RequestOutput:
        """The next output. Asking for it says that the last one is written."""
        self._end_turn()
        if self._outputs:
            self._turn, output = self._outputs.popleft()
            await self._turns.reach(self._turn)
            return output
        await self._turns.reach(self._turns.num)
        self._is_replaying = False
        return self._queue.get_nowait() or await self._queue.get()

    def close(self) -> None:
        """Let others go on; nobody reads any more."""
        self._end_turn()
        self._queue.close()

    def _end_turn(self) -> None:
        if self._turn is not None:
            self._turns.end(self._turn)
            self._turn = None


def replay(
    processor: OutputProcessor, request: EngineCoreRequest, groups: Sequence[Group], max_model_len: int
) -> list[tuple[int, RequestOutput]]:
    """Pass tokens through a registered request's output state and return what a client would have got.

    The request's parameters carry the tokens already. When they end it, its state is gone afterwards.
    """
    state = processor.request_states[request.request_id]
    queue, state.queue = state.queue, RequestOutputCollector(state.output_kind, request.request_id)
    finish_reason, stop_reason = _end(request, max_model_len)
    outputs: list[tuple[int, Any]] = []
    for turn, token_ids in groups:
        output = EngineCoreOutput(request.request_id, list(token_ids), _logprobs(request, token_ids))
        if turn == groups[-1][0]:
            output.finish_reason, output.stop_reason = finish_reason, stop_reason
        processor.process_outputs([output])
        if (seen := state.queue.get_nowait()) is not None:
            outputs.append((turn, seen))
    state.queue = queue
    # The engine's own first output still brings the prefill statistics.
    state.is_prefilling = True
    return outputs


def _end(request: EngineCoreRequest, max_model_len: int) -> tuple[Any, Any]:
    """Whether the tokens end the request, by the scheduler's own rules."""
    probe = Request.from_engine_core_request(request, None)
    is_over = check_stop(probe, max_model_len)
    return (probe.get_finished_reason(), probe.stop_reason) if is_over else (None, None)


def _logprobs(request: EngineCoreRequest, token_ids: Sequence[int]) -> LogprobsLists | None:
    """Zeros where the application expects log-probabilities: the client has the events that tell the real ones."""
    if request.sampling_params is None or request.sampling_params.num_logprobs is None:
        return None
    ids = np.array(token_ids, np.int32).reshape(-1, 1)
    return LogprobsLists(ids, np.zeros(ids.shape, np.float32), np.ones(len(ids), np.int32))


def in_order(outputs: Iterable[tuple[int, RequestOutput]]) -> list[tuple[int, RequestOutput]]:
    """Outputs of all choices of a prompt, by turn; only the last can end the prompt."""
    ordered = sorted(outputs, key=lambda output: output[0])
    is_over = any(output.finished for _, output in ordered)
    for _, output in ordered:
        output.finished = is_over and output is ordered[-1][1]
    return ordered
