"""The LoRA adapters that a worker holds: loaded, changed and let go while requests run.

A request keeps the version with which it began. Its caches and tickets are those of that version: the digest goes into
the salt that separates prefix caches, and into the fingerprint of its tickets.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from inferflux.engine.base import Adapter, Engine
from inferflux.errors import Conflict, InferfluxError, ModelRefused, Unavailable
from inferflux.models import adapters, verification
from inferflux.models.anchors import Anchors
from inferflux.models.folder import ModelFolder
from inferflux.models.rules import Rules, SignaturePolicy
from inferflux.telemetry import metrics
from inferflux.types import RequestContext, Role
from inferflux.worker import rules
from inferflux.worker.settings import WorkerSettings

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Held:
    """One adapter as the registry hears of it."""

    name: str
    revision: int
    digest: str


@dataclass(slots=True, eq=False)
class Version:
    """One adapter in the engine, and how many requests use it. `is_current`: new requests do."""

    adapter: Adapter
    revision: int
    is_current: bool = True
    num_uses: int = 0


@dataclass(slots=True)
class Adapters:
    """All adapters of one worker; used from one event loop. `on_change` is called when what it holds has changed."""

    engine: Engine
    settings: WorkerSettings
    role: Role
    on_change: Callable[[], None] = field(default=lambda: None)
    _current: dict[str, Version] = field(default_factory=dict)
    _versions: list[Version] = field(default_factory=list)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _dropping: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def held(self) -> list[Held]:
        """What new requests may use."""
        return [Held(v.adapter.name, v.revision, v.adapter.digest) for v in self._current.values()]

    async def load(self, name: str, source: Path, revision: int, *, is_pinned: bool = False) -> str:
        """Hold an adapter, instead of the one that has its name now; returns its digest. Idempotent.

        Raises Conflict when there is no room, ModelRefused for its files, InvalidRequest when it does not fit.
        """
        async with self._lock:
            limit = self.settings.max_adapters
            if name not in self._current and len(self._current) >= limit:
                raise Conflict(f"the worker holds {len(self._current)} adapters, INFERFLUX_MAX_ADAPTERS is {limit}")
            told = await self._rules(name, source)
            folder, digest = await asyncio.to_thread(
                adapters.take, source, self._directory, lambda opened: self._check(name, opened, told)
            )
            adapter = Adapter(name, folder, digest, is_pinned)
            version = next((v for v in self._versions if v.adapter == adapter), None)
            if version is None:
                await self.engine.load_adapter(adapter)
                version = Version(adapter, revision)
                self._versions.append(version)
            version.revision = revision
            await self._put(name, version)
        _log.info("adapter loaded", extra={"adapter": name, "revision": revision, "digest": digest[:16]})
        return digest

    async def unload(self, name: str) -> None:
        """Let an adapter go as soon as no request uses it. Idempotent."""
        async with self._lock:
            if name in self._current:
                await self._put(name, None)
                _log.info("adapter unloaded", extra={"adapter": name})

    @contextmanager
    def using(self, context: RequestContext) -> Iterator[RequestContext]:
        """Give the context of a request as its engine gets it; the adapter it names stays inside the block.

        Raises Unavailable when it is not here.
        """
        if not context.adapter:
            yield context
            return
        version = self._current.get(context.adapter)
        if version is None:
            raise Unavailable(f"adapter {context.adapter!r} is not on this worker", retry_after_s=1)
        version.num_uses += 1
        try:
            digest = version.adapter.digest
            yield replace(context, cache_salt=salted(context.cache_salt, digest), adapter_digest=digest)
        finally:
            version.num_uses -= 1
            self._drop_later(version)

    def close(self) -> None:
        """Remove what was copied."""
        for task in self._dropping:
            task.cancel()
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def _directory(self) -> Path:
        return self.settings.run_dir / f"{self.settings.instance_id}.adapters"

    async def _put(self, name: str, version: Version | None) -> None:
        """Make a version the current one of its name; None: there is none any more."""
        before = self._current.pop(name, None)
        if version is not None:
            version.is_current = True
            self._current[name] = version
        metrics.ADAPTERS.set(len(self._current))
        if before is not None and before is not version:
            before.is_current = False
            if not before.num_uses:
                await self._drop(before)
        self.on_change()

    def _drop_later(self, version: Version) -> None:
        """Let go of a version whose last request is over."""
        if version.num_uses or version.is_current:
            return
        task = asyncio.get_running_loop().create_task(self._drop_unused(version), name="adapter-drop")
        self._dropping.add(task)
        task.add_done_callback(self._dropping.discard)

    async def _drop_unused(self, version: Version) -> None:
        async with self._lock:
            if not version.num_uses and not version.is_current and version in self._versions:
                await self._drop(version)

    async def _drop(self, version: Version) -> None:
        self._versions.remove(version)
        is_last = version.adapter.name not in self._current
        try:
            await self.engine.drop_adapter(version.adapter, is_last=is_last)
        except InferfluxError as e:
            _log.warning("adapter not dropped", extra={"adapter": version.adapter.name, "reason": e.message})
        if not any(v.adapter.folder == version.adapter.folder for v in self._versions):
            shutil.rmtree(version.adapter.folder, ignore_errors=True)

    async def _rules(self, name: str, source: Path) -> Rules:
        """What the registry says against a signed adapter; nothing for others."""
        if self.settings.model_signature is SignaturePolicy.OFF or not (source / verification.SIGNATURE).is_file():
            return Rules()
        return await rules.ask(replace(self.settings, model=name), self.role)

    def _check(self, name: str, folder: ModelFolder, told: Rules) -> None:
        """Verify an adapter as a model is verified. Raises ModelRefused."""
        if self.settings.model_signature is SignaturePolicy.OFF:
            return
        try:
            self._verify(name, folder, told)
        except ModelRefused as e:
            if self.settings.model_signature is SignaturePolicy.REQUIRE:
                metrics.MODEL_VERIFICATIONS.labels("refused").inc()
                raise
            metrics.MODEL_VERIFICATIONS.labels("warned").inc()
            _log.warning("adapter does not verify", extra={"reason": e.message, "adapter": name})
        else:
            metrics.MODEL_VERIFICATIONS.labels("verified").inc()

    def _verify(self, name: str, folder: ModelFolder, told: Rules) -> None:
        verified = verification.verify(folder, Anchors.load(self.settings.model_keys_dir), told)
        if verified.manifest is not None and verified.manifest.name != name:
            raise ModelRefused(f"signed as {verified.manifest.name!r}, not as {name!r}")


def salted(cache_salt: str, digest: str) -> str:
    """Separate an adapter's caches from those of other adapters and of the model itself."""
    return hmac.digest(bytes.fromhex(digest), cache_salt.encode(), "sha256").hex()
