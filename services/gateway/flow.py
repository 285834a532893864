"""The walk of a request through the cluster, the whole of it. Read this first.

    route --> prefill worker --> tickets --> decode worker --> bytes --> client

Each `with` gives back what it took on every way out: an answer, an error, a lost worker, a client that went away, a
deadline. So a request can end anywhere, and nothing of it stays behind.
"""

from __future__ import annotations

import logging

from inferflux.errors import DeadlineExceeded, Draining, InferfluxError, WorkerLost
from inferflux.telemetry import metrics
from inferflux.types import HttpAnswer
from services.gateway.call import Call, Phase
from services.gateway.pool import Pool, Route
from services.gateway.prefill import Tickets
from services.gateway.reply import Reply

_log = logging.getLogger(__name__)


async def serve(call: Call, pool: Pool, reply: Reply) -> None:
    """Answer a call. A decode worker lost before the first byte costs a second walk, not the request."""
    route = pool.route(call.model, needs_prefill=call.needs_prefill)
    try:
        await walk(call, route, reply)
    except (WorkerLost, Draining) as e:
        if reply.has_started:
            raise
        _log.warning("trying again", extra={"worker": route.decode.worker_id, "reason": e.reason})
        metrics.RETRIES.labels(e.reason).inc()
        excluded = frozenset({route.decode.worker_id})
        await walk(call, pool.route(call.model, needs_prefill=call.needs_prefill, excluded=excluded), reply)


async def walk(call: Call, route: Route, reply: Reply) -> None:
    """Take a call through its phases once, on the workers of a route."""
    with route:
        prompts = await prefill(call, route)
        if isinstance(prompts, HttpAnswer):
            await reply.answer(prompts)
            return
        call.phase, call.decode_worker = Phase.DECODE, route.decode.worker_id
        with prompts as tickets, call.span("decode") as span, route.decode.start(call, span, tickets) as stream:
            try:
                await stream.relay(reply)
            finally:
                call.usage = stream.usage


async def prefill(call: Call, route: Route) -> Tickets | HttpAnswer:
    """Have the prompts computed on the prefill worker. No tickets: the decode worker shall compute them itself."""
    if route.prefill is None:
        return Tickets()
    call.phase, call.prefill_worker = Phase.PREFILL, route.prefill.worker_id
    try:
        with call.span("prefill") as span:
            return await route.prefill.prefill(call, span)
    except DeadlineExceeded:
        raise
    except InferfluxError as e:
        _log.warning("prefill failed, decode does it", extra={"worker": call.prefill_worker, "reason": e.reason})
        return Tickets()
