"""The public keys of token issuers: fetched in the background, used from memory.

Each issuer has one task, the only one that fetches: so there is one request at a time, however many want news. Keys
that an issuer no longer publishes are gone with the next fetch. When fetching fails, the last keys stay in use for a
while.
"""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from inferflux.clock import Clock
from inferflux.errors import InferfluxError, Unavailable
from inferflux.policy.identity import Issuer, Network
from inferflux.process import Tasks
from inferflux.telemetry import metrics

if TYPE_CHECKING:
    from joserfc.jwk import ECKey, RSAKey

    VerifyingKey = RSAKey | ECKey

REFRESH_S = 30.0
MIN_INTERVAL_S = 5.0
"""Least time between two fetches, whoever asks for one."""
WAIT_S = 2.0
"""Longest that a request waits for a key it has not seen yet."""
MAX_KEYS = 64
MIN_RSA_BITS, MAX_RSA_BITS = 2048, 8192
Fetch = Callable[[str, Network], Awaitable[dict[str, Any]]]
Place = tuple[str, str | None, Network]
"""Where an issuer's keys are: its name, the URL of its keys, and the network they may be fetched from."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Keys:
    """What an issuer publishes. `nameless`: keys without an id."""

    by_id: Mapping[str, VerifyingKey] = field(default_factory=dict)
    nameless: tuple[VerifyingKey, ...] = ()

    def find(self, key_id: str | None) -> VerifyingKey | None:
        """Return the key of a token; one without an id can only mean the only key there is, and so can't others."""
        if key_id is not None and (named := self.by_id.get(key_id)) is not None:
            return named
        if key_id is None or not self.by_id:
            only = (*self.by_id.values(), *self.nameless)
            return only[0] if len(only) == 1 else None
        return None


class KeySource:
    """The keys of one issuer, kept current by `run`."""

    def __init__(self, place: Place, fetch: Fetch, clock: Clock) -> None:
        self.place = place
        self.keys: Keys | None = None
        self._fetch = fetch
        self._clock = clock
        self._fetched_at = self._tried_at = float("-inf")
        self._is_wanted = asyncio.Event()
        self._news = asyncio.Event()

    def current(self, stale_s: float) -> Keys:
        """Return the keys in use. Raises Unavailable when there are none, or they are too old."""
        if self.keys is None or self._clock.monotonic() - self._fetched_at > stale_s:
            raise Unavailable("the keys of the token's issuer cannot be fetched", retry_after_s=5)
        return self.keys

    async def refreshed(self) -> None:
        """Wait for the next fetch, if it may be now: at most WAIT_S, and not at all just after another one."""
        if self._clock.monotonic() - self._tried_at < MIN_INTERVAL_S:
            return
        news = self._news
        self._is_wanted.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(WAIT_S):
                await news.wait()

    async def run(self) -> None:
        """Fetch for ever."""
        while True:
            await self.refresh()
            await asyncio.sleep(MIN_INTERVAL_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_S - MIN_INTERVAL_S if self.keys is not None else 0):
                    await self._is_wanted.wait()

    async def refresh(self) -> None:
        """Fetch once; a failure leaves the keys as they are."""
        self._is_wanted.clear()
        self._tried_at = self._clock.monotonic()
        try:
            keys = parse_keys(await self._fetch(await self._keys_url(), self.place[2]))
            if keys != self.keys:  # the same keys stay the same object: what was verified by them stays verified
                self.keys = keys
            self._fetched_at = self._clock.monotonic()
            metrics.JWKS_FETCHES.labels("ok").inc()
        except InferfluxError as e:
            metrics.JWKS_FETCHES.labels("failed").inc()
            _log.warning("keys of an issuer not fetched", extra={"issuer": self.place[0], "error": e.message})
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _keys_url(self) -> str:
        """Return the given URL, or ask the issuer."""
        issuer, url, network = self.place
        if url is not None:
            return url
        document = await self._fetch(issuer.rstrip("/") + "/.well-known/openid-configuration", network)
        found = document.get("jwks_uri")
        if document.get("issuer") != issuer or not isinstance(found, str):
            raise Unavailable(f"the discovery document of {issuer} is not of this issuer, or names no keys")
        return found


class KeySources:
    """The sources of all issuers; their tasks are owned by `tasks`."""

    def __init__(self, tasks: Tasks, fetch: Fetch, clock: Clock) -> None:
        self._tasks = tasks
        self._fetch = fetch
        self._clock = clock
        self._sources: dict[Place, tuple[KeySource, asyncio.Task[None]]] = {}

    def reconcile(self, issuers: Iterable[Issuer]) -> None:
        """Fetch the keys of these issuers and no others. An issuer that only changed its rules keeps its keys."""
        wanted = {place_of(issuer) for issuer in issuers}
        for place in self._sources.keys() - wanted:
            self._sources.pop(place)[1].cancel()
        for place in wanted - self._sources.keys():
            source = KeySource(place, self._fetch, self._clock)
            self._sources[place] = source, self._tasks.spawn(source.run(), f"keys of {place[0]}")

    def of(self, issuer: Issuer) -> KeySource:
        """Return an issuer's source. Raises Unavailable before it was taken in."""
        if (found := self._sources.get(place_of(issuer))) is None:
            raise Unavailable("the token's issuer is new to this gateway", retry_after_s=1)
        return found[0]


def place_of(issuer: Issuer) -> Place:
    """Say where an issuer's keys are."""
    return issuer.issuer, issuer.jwks_url, issuer.network


def parse_keys(document: Mapping[str, Any]) -> Keys:
    """Read a key set: public RSA and P-256 keys for signatures; others are passed over. Raises Unavailable."""
    entries = document.get("keys")
    if not isinstance(entries, list) or len(entries) > MAX_KEYS:
        raise Unavailable(f"a key set must have a list of at most {MAX_KEYS} keys")
    by_id: dict[str, VerifyingKey] = {}
    nameless: list[VerifyingKey] = []
    for entry in entries:
        if (key := _key(entry)) is None:
            continue
        key_id = entry.get("kid")
        if key_id is None:
            nameless.append(key)
        elif not isinstance(key_id, str) or key_id in by_id:
            raise Unavailable("the ids of the keys in a key set must be texts, each there once")
        else:
            by_id[key_id] = key
    if not by_id and not nameless:
        raise Unavailable("a key set has no key that can verify RS256 or ES256")
    return Keys(by_id, tuple(nameless))


def _key(entry: Any) -> VerifyingKey | None:
    from joserfc.errors import JoseError  # noqa: PLC0415 - most gateways verify no tokens
    from joserfc.jwk import ECKey, RSAKey  # noqa: PLC0415

    if not isinstance(entry, dict) or entry.get("use", "sig") != "sig" or "d" in entry:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # short keys are passed over below
            if entry.get("kty") == "RSA" and entry.get("alg", "RS256") == "RS256":
                key = RSAKey.import_key(entry)
                return key if MIN_RSA_BITS <= key.raw_value.key_size <= MAX_RSA_BITS else None
            if entry.get("kty") == "EC" and entry.get("crv") == "P-256" and entry.get("alg", "ES256") == "ES256":
                return ECKey.import_key(entry)
    except (JoseError, ValueError, TypeError, KeyError):
        pass
    return None
