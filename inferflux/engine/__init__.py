"""Engines: what turns tokens into KV blocks and KV blocks into tokens. `base` is the contract."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inferflux.errors import ConfigError

if TYPE_CHECKING:
    from inferflux.engine.base import Engine
    from inferflux.engine.options import EngineOptions
    from inferflux.kv.arena import Arena
    from inferflux.kv.prefixes import PrefixStore

ENGINES = ("vllm", "sim")


def create(name: str, options: EngineOptions, arena: Arena | None, prefixes: PrefixStore | None = None) -> Engine:
    """Make the engine `name`, not yet started. Imports it only now: vllm takes seconds and hundreds of MB.

    `prefixes`: the store of `arena`'s blocks; None: no prompt finds anything there.
    """
    if name == "vllm":
        from inferflux.engine.vllm import VllmEngine  # noqa: PLC0415

        return VllmEngine(options, arena, prefixes)
    if name == "sim":
        from inferflux.engine.sim import SimEngine  # noqa: PLC0415

        return SimEngine(options, arena, prefixes)
    raise ConfigError(f"engine: {name!r} is not one of {', '.join(ENGINES)}")
