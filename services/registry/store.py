"""The registry's Redis: model records, and a mirror of each replica's leases.

Layout: `ifx:{registry}:revision` a number, `ifx:{registry}:models` a hash of records, `ifx:{registry}:rosters` a hash
of one roster per replica, `ifx:{registry}:releases` a hash of signed versions by model, `ifx:{registry}:revoked_keys` a
set, `ifx:{registry}:rules:revision` a number, `ifx:{registry}:deployments` and
`ifx:{registry}:adapters` hashes of what is wanted, by name. Models, releases and
deployments are written under WATCH and MULTI; a roster has one writer. Every failure of Redis, slow answers included,
is Unavailable.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

from inferflux.errors import Internal, InvalidRequest
from inferflux.store import Pipe, RedisStore, read_revision
from services.registry.deployments.adapter import AdapterSpec
from services.registry.deployments.deployment import Deployment
from services.registry.models import Model, ModelBook
from services.registry.releases import Release
from services.registry.roster import Roster

log = logging.getLogger(__name__)

REVISION = "ifx:{registry}:revision"
MODELS = "ifx:{registry}:models"
ROSTERS = "ifx:{registry}:rosters"
RELEASES = "ifx:{registry}:releases"
REVOKED_KEYS = "ifx:{registry}:revoked_keys"
RULES_REVISION = "ifx:{registry}:rules:revision"
DEPLOYMENTS = "ifx:{registry}:deployments"
ADAPTERS = "ifx:{registry}:adapters"
CHANNEL = "ifx:{registry}:changes"


class RegistryStore(RedisStore):
    """Models and rosters in Redis; connects on demand. Safe to use concurrently. Raises ConfigError for a bad URL."""

    def __init__(self, url: str) -> None:
        super().__init__(url, "registry")

    async def write_roster(self, owner: str, roster: Roster, *, announce: bool) -> None:
        """Replace the owner's roster; `announce` makes the other replicas read it now. Raises Unavailable."""
        with self._answering():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.hset(ROSTERS, owner, roster.encode())
                if announce:
                    pipe.publish(CHANNEL, owner)
                await pipe.execute()

    async def read(self) -> tuple[int, dict[str, Roster]]:
        """Return the revision of the models and the rosters by owner. Raises Unavailable."""
        with self._answering():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.get(REVISION)
                pipe.hgetall(ROSTERS)
                revision, texts = await pipe.execute()
        rosters = {owner: roster for owner, text in texts.items() if (roster := Roster.decode(text))}
        return read_revision(revision), rosters

    async def forget(self, owner: str) -> None:
        """Remove the roster of a replica that is gone. Raises Unavailable."""
        with self._answering():
            await self._redis.hdel(ROSTERS, owner)

    async def update(self, edit: Callable[[ModelBook], ModelBook]) -> ModelBook:
        """Replace the stored models by what `edit` makes of them and tell the replicas, or do nothing at all.

        `edit` may run several times, and may raise. A book of the same revision is not written. Raises Unavailable.
        """
        return await self._transact(lambda pipe: _try_update(pipe, edit))

    async def release(self, name: str) -> Release:
        """Return all versions of a model. Raises Unavailable."""
        with self._answering():
            return _decode_release(name, await self._redis.hget(RELEASES, name))

    async def edit_release(self, name: str, edit: Callable[[Release], Release]) -> Release:
        """Replace the versions of a model by what `edit` makes of them; see `update`. Raises Unavailable."""
        return await self._transact(lambda pipe: _try_edit_release(pipe, name, edit))

    async def revoke_key(self, key_id: str) -> None:
        """End the trust in a signing key. Raises Unavailable."""
        with self._answering():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.sadd(REVOKED_KEYS, key_id)
                pipe.incr(RULES_REVISION)
                await pipe.execute()

    async def rules(self, name: str) -> tuple[Release, frozenset[str], int]:
        """Return the versions of a model, all revoked keys, and the revision of both. Raises Unavailable."""
        with self._answering():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.hget(RELEASES, name)
                pipe.smembers(REVOKED_KEYS)
                pipe.get(RULES_REVISION)
                text, keys, revision = await pipe.execute()
        return _decode_release(name, text), frozenset(keys), read_revision(revision)

    async def deployments(self) -> dict[str, Deployment]:
        """Return all deployments by model. Raises Unavailable."""
        with self._answering():
            texts = await self._redis.hgetall(DEPLOYMENTS)
        return {name: deployment for name, text in texts.items() if (deployment := _decode_deployment(name, text))}

    async def adapters(self) -> dict[str, AdapterSpec]:
        """Return all adapters by name. Raises Unavailable."""
        with self._answering():
            texts = await self._redis.hgetall(ADAPTERS)
        return {name: spec for name, text in texts.items() if (spec := _decode_adapter(name, text))}

    async def put_adapter(self, spec: AdapterSpec) -> None:
        """Create or replace an adapter. Raises Unavailable."""
        with self._answering():
            await self._redis.hset(ADAPTERS, spec.name, json.dumps(spec.to_json()))

    async def delete_adapter(self, name: str) -> bool:
        """Remove an adapter; says whether there was one. Raises Unavailable."""
        with self._answering():
            return bool(await self._redis.hdel(ADAPTERS, name))

    async def edit_deployment(
        self, name: str, edit: Callable[[Deployment | None], Deployment | None]
    ) -> Deployment | None:
        """Replace a model's deployment by what `edit` makes of it, None: none; see `update`. Raises Unavailable."""
        return await self._transact(lambda pipe: _try_edit_deployment(pipe, name, edit))

    def subscribe(self) -> AbstractAsyncContextManager[Callable[[float], Awaitable[None]]]:
        """Give a function that waits for the next write of any replica, at most so many seconds. Raises Unavailable."""
        return self._subscribe(CHANNEL)


async def _try_update(pipe: Pipe, edit: Callable[[ModelBook], ModelBook]) -> ModelBook:
    await pipe.watch(REVISION, MODELS)
    revision, texts = read_revision(await pipe.get(REVISION)), await pipe.hgetall(MODELS)
    stored = ModelBook(revision, {name: model for name, text in texts.items() if (model := _decode(name, text))})
    book = edit(stored)
    pipe.multi()
    if book.revision == stored.revision:
        pipe.get(REVISION)  # EXEC proves that nothing moved between the reads
    else:
        _write(pipe, stored, book)
    await pipe.execute()
    return book


async def _try_edit_release(pipe: Pipe, name: str, edit: Callable[[Release], Release]) -> Release:
    await pipe.watch(RELEASES)
    stored = _decode_release(name, await pipe.hget(RELEASES, name))
    release = edit(stored)
    pipe.multi()
    if release != stored:
        pipe.hset(RELEASES, name, json.dumps(release.to_json()))
        pipe.incr(RULES_REVISION)
    await pipe.execute()
    return release


async def _try_edit_deployment(
    pipe: Pipe, name: str, edit: Callable[[Deployment | None], Deployment | None]
) -> Deployment | None:
    await pipe.watch(DEPLOYMENTS)
    text = await pipe.hget(DEPLOYMENTS, name)
    stored = _decode_deployment(name, text) if text is not None else None
    deployment = edit(stored)
    pipe.multi()
    if deployment is None:
        pipe.hdel(DEPLOYMENTS, name)
    elif deployment != stored:
        pipe.hset(DEPLOYMENTS, name, json.dumps(deployment.to_json()))
    await pipe.execute()
    return deployment


def _decode_deployment(name: str, text: str) -> Deployment | None:
    """Read a deployment; None when it is none: an operator can make it anew."""
    try:
        deployment = Deployment.from_json(json.loads(text))
        if deployment.model == name:
            return deployment
    except (InvalidRequest, ValueError, KeyError, TypeError, AttributeError):
        pass
    log.error("ignoring a deployment that cannot be read", extra={"model": name})
    return None


def _decode_adapter(name: str, text: str) -> AdapterSpec | None:
    """Read an adapter; None when it is none: an operator can make it anew."""
    try:
        spec = AdapterSpec.from_json(json.loads(text))
        if spec.name == name:
            return spec
    except (InvalidRequest, ValueError):
        pass
    log.error("ignoring an adapter that cannot be read", extra={"adapter": name})
    return None


def _decode_release(name: str, text: str | None) -> Release:
    """Read a release. One that can't be read is never taken for none: that would drop the floor."""
    if text is None:
        return Release()
    try:
        return Release.from_json(json.loads(text))
    except (ValueError, KeyError, TypeError) as e:
        raise Internal(f"the stored versions of model {name!r} cannot be read") from e


def _write(pipe: Pipe, stored: ModelBook, book: ModelBook) -> None:
    changed = {name: json.dumps(m.to_json()) for name, m in book.models.items() if stored.models.get(name) != m}
    if changed:
        pipe.hset(MODELS, mapping=changed)
    if gone := stored.models.keys() - book.models.keys():
        pipe.hdel(MODELS, *gone)
    pipe.set(REVISION, book.revision)
    pipe.publish(CHANNEL, "models")


def _decode(name: str, text: str) -> Model | None:
    """Read a record; None when it is none: workers tell their models again."""
    try:
        model = Model.from_json(json.loads(text))
        if model.name == name:
            return model
    except (InvalidRequest, ValueError, KeyError, TypeError):
        pass
    log.error("ignoring a model record that cannot be read", extra={"model": name})
    return None
