"""GuardService: one question at a time for each model, and none whose asker has stopped waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import grpc

from inferflux.errors import InvalidRequest, Unavailable
from inferflux.v1 import guard_service_pb2 as pb
from inferflux.v1.guard_service_pb2_grpc import GuardServiceServicer
from services.guardrails.judges import Found, Judge, Question

CALLERS = {"/inferflux.v1.GuardService/": frozenset(("gateway",))}
MAX_WAITING = 32
"""Questions that wait for one model; more are refused at once, since they would only come too late."""
Context = grpc.aio.ServicerContext[pb.JudgeRequest, pb.JudgeResponse]


class Desk:
    """One model, and the thread in which it judges."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._thread = ThreadPoolExecutor(1)
        self._num_waiting = 0

    async def ask(self, question: Question) -> list[Found]:
        """Have the model judge. Cancelled before its turn, the question is not asked. Raises Unavailable."""
        if self._num_waiting >= MAX_WAITING:
            raise Unavailable(f"{self._num_waiting} questions wait for this model already")
        self._num_waiting += 1
        try:
            return await asyncio.wrap_future(self._thread.submit(lambda: list(self._judge.judge(question))))
        finally:
            self._num_waiting -= 1

    def close(self) -> None:
        """Let go of the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class GuardServicer(GuardServiceServicer):
    """Answers gateways. `desks` by kinds of rules."""

    def __init__(self, desks: Mapping[str, Desk]) -> None:
        self._desks = desks

    async def Judge(self, request: pb.JudgeRequest, context: Context) -> pb.JudgeResponse:  # noqa: N802
        """Judge. Raises InvalidRequest for a kind that this worker has no model of."""
        desk = self._desks.get(request.kind)
        if desk is None:
            raise InvalidRequest(f"this worker judges {', '.join(self._desks)}")
        found = await desk.ask(Question(request.texts, request.types, request.threshold, request.examples))
        matches = [pb.JudgedMatch(text=f.text, start=f.start, end=f.end, label=f.label, score=f.score) for f in found]
        return pb.JudgeResponse(matches=matches)
