"""A decode worker whose engine dies of its first request. As model "dies and hangs" it cannot be closed either."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from typing import Any

from inferflux.engine.options import EngineOptions
from inferflux.engine.sim import SimEngine
from inferflux.types import Frame, RequestContext
from inferflux.worker import main as worker
from services.decode import __main__ as decode


class MortalEngine(SimEngine):
    """See above."""

    async def generate(self, context: RequestContext, *args: Any) -> AsyncGenerator[Frame]:
        await super().close()
        async for frame in super().generate(context, *args):
            yield frame

    async def close(self) -> None:
        if self._options.model == "dies and hangs":
            await asyncio.Event().wait()
        await super().close()


def create(name: str, options: EngineOptions, *_: Any) -> MortalEngine:
    """Stand in for `inferflux.engine.create`."""
    return MortalEngine(options, None)


if __name__ == "__main__":
    vars(worker)["create"] = create
    worker.EXIT_S = 1.5
    sys.exit(decode.main())
