"""Ids and times of a response that follow from its request, so that every worker writes the same ones.

The application of vLLM draws ids at random and asks the clock when it writes. Within a call of ours both are derived
from the request's id and the time at which the gateway took it.
"""

from __future__ import annotations

import sys
import time
import uuid
from contextvars import ContextVar
from hashlib import blake2b
from types import ModuleType
from typing import Any

from vllm import utils

IDENTITY: ContextVar[Identity | None] = ContextVar("inferflux_identity", default=None)
# Everything that writes responses. Not the engine: its ids tell apart what runs here at the same time.
WRITERS = ("vllm.entrypoints.", "vllm.renderers.", "vllm.tool_parsers.", "vllm.parser.", "vllm.reasoning.")
# Those that put the time into responses; others note when a request arrived.
STAMPERS = "vllm.entrypoints."


class Identity:
    """What is unique about one response. Its ids come in the order of drawing."""

    def __init__(self, request_id: str, created_s: int) -> None:
        self.created_s = created_s
        self._request_id = request_id
        self._num_drawn = 0

    def draw(self) -> str:
        """The next id: 32 hexadecimal digits."""
        self._num_drawn += 1
        return blake2b(f"{self._request_id}/{self._num_drawn}".encode(), digest_size=16).hexdigest()


def random_uuid() -> str:
    """A random id as vLLM has them, or the response's own."""
    identity = IDENTITY.get()
    return identity.draw() if identity is not None else uuid.uuid4().hex


def uuid4() -> uuid.UUID:
    """A random UUID, or the response's own."""
    return uuid.UUID(random_uuid())


def now() -> float:
    """The time, or that of the response; seconds since the epoch."""
    identity = IDENTITY.get()
    return float(identity.created_s) if identity is not None and identity.created_s else time.time()


class Substitute(ModuleType):
    """A module with some of its functions replaced."""

    def __init__(self, module: ModuleType, **functions: Any) -> None:
        super().__init__(module.__name__)
        self._module = module
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def derive_from_requests() -> None:
    """Make all loaded modules that write responses use ours. Call when the application is complete. Idempotent."""
    ids = {id(utils.random_uuid): random_uuid, id(uuid): Substitute(uuid, uuid4=uuid4)}
    clock = {id(time): Substitute(time, time=now)}
    for name, module in list(sys.modules.items()):
        if name.startswith(WRITERS):
            _substitute(module, ids | clock if name.startswith(STAMPERS) else ids)


def _substitute(module: ModuleType, ours: dict[int, Any]) -> None:
    for attribute, value in list(vars(module).items()):
        if (substitute := ours.get(id(value))) is not None:
            setattr(module, attribute, substitute)
