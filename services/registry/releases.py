"""Versions of signed models, as values: what was pushed, which one counts, and how far back workers may go.

A version is pushed once and never changes. Promoting one raises the floor: whoever puts an older, validly signed folder
in place of the current one finds that workers refuse it. Only a rollback lowers the floor, and it is remembered.
"""

from __future__ import annotations

import base64
from dataclasses import asdict, dataclass, replace
from typing import Any

from inferflux.errors import Conflict, InvalidRequest, ModelRefused, NotFound
from inferflux.models.manifest import Manifest

MAX_VERSIONS, MAX_EVENTS = 200, 1000
MAX_SIGNATURE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Version:
    """One pushed version; see ModelVersion for the fields. `manifest` and `signature` are base64."""

    version: int
    weights_digest: str
    key_id: str
    source: str
    manifest: str
    signature: str
    pushed_at_ms: int = 0

    @classmethod
    def make(cls, key_id: str, source: str, manifest: bytes, signature: bytes) -> tuple[str, Version]:
        """Return the model's name and its version, read from the manifest. Raises InvalidRequest."""
        try:
            read = Manifest.parse(manifest)
        except ModelRefused as e:
            raise InvalidRequest(e.message, param="manifest") from e
        if not 0 < len(signature) <= MAX_SIGNATURE_BYTES:
            raise InvalidRequest(f"a signature has 1 to {MAX_SIGNATURE_BYTES} bytes, not {len(signature)}")
        if not is_key_id(key_id):
            raise InvalidRequest("key_id must be a SHA-256 in lower-case hex", param="key_id")
        texts = base64.b64encode(manifest).decode(), base64.b64encode(signature).decode()
        return read.name, cls(read.version, read.weights_digest, key_id, source[:1024], *texts)

    def is_same(self, other: Version) -> bool:
        """Whether two pushes are about the same files."""
        return self.manifest == other.manifest


@dataclass(frozen=True, slots=True)
class Event:
    """What was done: push, promote or rollback."""

    at_ms: int
    action: str
    version: int


@dataclass(frozen=True, slots=True)
class Release:
    """All versions of one model. `promoted`: those that were current, the last one is; a rollback takes it away."""

    versions: tuple[Version, ...] = ()
    promoted: tuple[int, ...] = ()
    events: tuple[Event, ...] = ()

    @property
    def current(self) -> int:
        """The promoted version; 0: none."""
        return self.promoted[-1] if self.promoted else 0

    @property
    def floor(self) -> int:
        """The least version that workers may load."""
        return self.current

    def push(self, version: Version, now_ms: int) -> Release:
        """Add a version. The same one again changes nothing. Raises Conflict."""
        for known in self.versions:
            if known.version == version.version:
                if known.is_same(version):
                    return self
                raise Conflict(f"version {version.version} was pushed with other files; versions never change")
        if version.version < self.floor:
            raise Conflict(f"version {version.version} is older than {self.floor}, which is promoted")
        if len(self.versions) >= MAX_VERSIONS:
            raise Conflict(f"the model has {len(self.versions)} versions, the limit is {MAX_VERSIONS}")
        versions = sorted((*self.versions, replace(version, pushed_at_ms=now_ms)), key=lambda v: v.version)
        return replace(self._noted("push", version.version, now_ms), versions=tuple(versions))

    def promote(self, version: int, now_ms: int) -> Release:
        """Make a version the current one. The current one again changes nothing. Raises NotFound or Conflict."""
        if all(known.version != version for known in self.versions):
            raise NotFound(f"version {version} was never pushed")
        if version == self.current:
            return self
        if version < self.floor:
            raise Conflict(f"version {version} is older than {self.floor}, which is promoted: roll back instead")
        return replace(self._noted("promote", version, now_ms), promoted=(*self.promoted, version))

    def roll_back(self, now_ms: int) -> Release:
        """Make the version current that was so before. Raises Conflict."""
        if len(self.promoted) < 2:
            raise Conflict("there is no earlier promoted version to go back to")
        return replace(self._noted("rollback", self.promoted[-2], now_ms), promoted=self.promoted[:-1])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Release:
        """Raises KeyError, ValueError or TypeError."""
        return cls(
            tuple(Version(**version) for version in fields["versions"]),
            tuple(map(int, fields["promoted"])),
            tuple(Event(**event) for event in fields["events"]),
        )

    def _noted(self, action: str, version: int, now_ms: int) -> Release:
        return replace(self, events=(*self.events, Event(now_ms, action, version))[-MAX_EVENTS:])


def is_key_id(text: str) -> bool:
    """Say whether `text` names a key: SHA-256, lower-case hex."""
    return len(text) == 64 and not set(text) - set("0123456789abcdef")
