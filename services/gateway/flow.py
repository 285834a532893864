"""The walk of a request through the cluster, the whole of it. Read this first.

    route --> prefill worker --> tickets --> decode worker --> bytes --> client

Each `with` gives back what it took on every way out: an answer, an error, a lost worker, a client that went away, a
deadline. So a request can end anywhere, and nothing of it stays behind. What it has of its response is in its journal,
so that it can walk again.
"""

from __future__ import annotations

import logging

from inferflux import failpoints
from inferflux.errors import DeadlineExceeded, InferfluxError, InvalidRequest
from inferflux.types import HttpAnswer
from services.gateway.call import Call, Phase
from services.gateway.pool import Pool, Route
from services.gateway.prefill import Tickets
from services.gateway.reply import Reply

MAX_PREFILLS = 2
_log = logging.getLogger(__name__)


async def serve(call: Call, pool: Pool, reply: Reply) -> None:
    """Answer a call. When its decode worker is lost, another one goes on where the response has got to."""
    route = pool.admit(call)
    while True:
        try:
            return await walk(call, route, pool, reply)
        except InferfluxError as e:
            if reply.error is not None:  # the answer itself has been refused
                raise
            _log.warning("decode failed", extra={"worker": route.decode.worker_id, "reason": e.reason})
            route = await pool.reroute(call, route, e)
        if not reply.is_streaming and not call.is_recalled:
            call.journal.forget()


async def walk(call: Call, route: Route, pool: Pool, reply: Reply) -> None:
    """Take a call through its phases once, on the workers of a route."""
    with route:
        if failpoints.ON:
            failpoints.hit("gateway.routed")
        prompts = await prefill(call, route, pool)
        if isinstance(prompts, HttpAnswer):
            await reply.answer(prompts)
            return
        call.phase, call.decode_worker = Phase.DECODE, route.decode.worker_id
        with prompts as tickets, call.span("decode") as span, route.decode.start(call, span, tickets) as stream:
            try:
                await stream.relay(reply)
            finally:
                call.usage = stream.usage


async def prefill(call: Call, route: Route, pool: Pool) -> Tickets | HttpAnswer:
    """Have the prompts computed on a prefill worker, or on another one when that is lost.

    No tickets: the decode worker shall compute them itself.
    """
    for _ in range(MAX_PREFILLS):
        if route.prefill is None:
            break
        call.phase, call.prefill_worker = Phase.PREFILL, route.prefill.worker_id
        try:
            with call.span("prefill") as span:
                return await route.prefill.prefill(call, span)
        except (DeadlineExceeded, InvalidRequest):
            raise  # another worker would say the same
        except InferfluxError as e:
            _log.warning("prefill failed", extra={"worker": call.prefill_worker, "reason": e.reason})
            pool.reroute_prefill(call, route, e)
    return Tickets(why_local=route.why_local)
