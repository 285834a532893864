"""The model that a worker is about to load: verified, or not, as the operator wants it.

A model that verifies is loaded through its open descriptors; one that does not is refused, or loaded as it lies there
after a warning. Independent of the engine: the simulated one is held to the same rules.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from inferflux.errors import ModelRefused
from inferflux.models import capabilities, manifest, verification
from inferflux.models.anchors import Anchors
from inferflux.models.folder import ModelFolder
from inferflux.models.rules import Rules, SignaturePolicy
from inferflux.models.verification import Verified
from inferflux.telemetry import metrics
from inferflux.types import Role
from inferflux.worker import rules
from inferflux.worker.settings import WorkerSettings

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadableModel:
    """What the engine is given. `capabilities` None: whatever the engine can. `version` 0 and no `signed_by`: unsigned.

    `digest`: of config.json and the weights, "" = not known.
    """

    folder: Path | None = None
    digest: str = ""
    numerics_reference: Path | None = None
    capabilities: tuple[str, ...] | None = None
    version: int = 0
    signed_by: str = ""
    files: ModelFolder | None = field(default=None, repr=False)

    async def check_unchanged(self) -> None:
        """Make sure that what was loaded is what was verified. Raises ModelRefused."""
        if self.files is not None and (changed := await _aside(self.files.changed)):
            metrics.MODEL_VERIFICATIONS.labels("refused").inc()
            raise ModelRefused(f"{changed[0]}: changed while the model was loaded")

    def capable_of(self, supported: tuple[str, ...]) -> tuple[str, ...]:
        """What both the model and its engine can do."""
        return supported if self.capabilities is None else capabilities.effective(self.capabilities, supported)


@asynccontextmanager
async def open_model(settings: WorkerSettings, role: Role) -> AsyncIterator[LoadableModel]:
    """Verify the model as `model_signature` says; it may be loaded inside the block.

    Raises ModelRefused, naming the file, ConfigError, or Unavailable.
    """
    with ExitStack() as stack:
        yield await _checked(settings, role, stack)


async def _checked(settings: WorkerSettings, role: Role, stack: ExitStack) -> LoadableModel:
    """Do what `open_model` says; `stack` closes the model's files."""
    if settings.model_dir is None or settings.model_signature is SignaturePolicy.OFF:
        return _as_it_lies(settings, role)
    try:
        folder = stack.enter_context(ModelFolder.open(settings.model_dir))
        verified = await _verify(folder, settings, role)
    except ModelRefused as e:
        if settings.model_signature is SignaturePolicy.REQUIRE:
            metrics.MODEL_VERIFICATIONS.labels("refused").inc()
            raise
        metrics.MODEL_VERIFICATIONS.labels("warned").inc()
        _log.warning("model does not verify", extra={"reason": e.message, "model": settings.model})
        return _as_it_lies(settings, role)
    metrics.MODEL_VERIFICATIONS.labels("verified").inc()
    if settings.executor == "ray":  # its ranks may be on hosts where our descriptors mean nothing
        return _verified(settings, role, folder, verified, settings.model_dir)
    view = settings.run_dir / f"{settings.instance_id}.model"
    stack.callback(shutil.rmtree, view, ignore_errors=True)
    folder.link(view)
    return _verified(settings, role, folder, verified, view)


async def _verify(folder: ModelFolder, settings: WorkerSettings, role: Role) -> Verified:
    verification.refuse_code(folder)
    anchors = Anchors.load(settings.model_keys_dir)
    if verification.is_signed(folder) and not anchors:
        raise ModelRefused(f"no keys in {settings.model_keys_dir}: nobody's signature is trusted here")
    told = await rules.ask(settings, role) if verification.is_signed(folder) else Rules()
    verified = await _aside(lambda: verification.verify(folder, anchors, told))
    _check_identity(settings, verified)
    _log.info(
        "model verified", extra={"model": settings.model, "version": verified.version, "key": verified.key_ids[0]}
    )
    return verified


def _check_identity(settings: WorkerSettings, verified: Verified) -> None:
    """Refuse another model than the one that was asked for, however well it is signed."""
    if verified.manifest is not None and verified.manifest.name != settings.model:
        raise ModelRefused(f"{manifest.NAME}: signed as {verified.manifest.name!r}, not as {settings.model!r}")
    if settings.model_digest not in ("", verified.weights_digest):
        wanted, actual = settings.model_digest[:16], verified.weights_digest[:16]
        raise ModelRefused(f"config.json and weights: their digest is {actual}..., {wanted}... was asked for")


def _as_it_lies(settings: WorkerSettings, role: Role) -> LoadableModel:
    folder, able = settings.model_dir, None
    if folder is not None and role is not Role.POOLING:  # its engine knows what the model was made for
        able = capabilities.of_generative(has_chat_template=manifest.has_chat_template(folder))
    return LoadableModel(folder, settings.model_digest, settings.numerics_reference, able)


def _verified(
    settings: WorkerSettings, role: Role, folder: ModelFolder, verified: Verified, path: Path
) -> LoadableModel:
    reference, signed = settings.numerics_reference, verified.manifest
    if signed is not None and signed.numerics:
        reference = path / signed.numerics
    able = signed.capabilities if signed else _as_it_lies(settings, role).capabilities
    digest, key = verified.weights_digest, verified.key_ids[0]
    return LoadableModel(path, digest, reference, able, verified.version, key, folder)


async def _aside(work: Callable[[], T]) -> T:
    """Run `work` in a thread that is gone afterwards: the engine's processes are forked from this one."""
    with ThreadPoolExecutor(1) as pool:
        return await asyncio.get_running_loop().run_in_executor(pool, work)
