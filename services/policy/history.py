"""The policy document's revisions, as a value: which one decides, which one is being tried, what was before.

Revisions are only ever added, each with the number of the book that got it. So histories merge like sets, and the
newest revision says all: if it is live, it decides and nothing is being tried; if it is a canary or in shadow, it is
the candidate beside the newest live one. Taking a candidate back, or going back to an old document, is one more
revision.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from inferflux.errors import Conflict, InvalidRequest, NotFound

KEPT = 100
MAX_REASON = 512
MAX_AUTHOR = 64
DEFAULT_ERROR_EXCESS = 0.05
CONFIG, SERVICE = "config", "policy"
"""Authors that are nobody: what was configured, and what the service itself takes back."""


class Stage(StrEnum):
    """How far a revision has got."""

    LIVE = "live"
    CANARY = "canary"
    SHADOW = "shadow"


@dataclass(frozen=True, slots=True)
class Revision:
    """One revision of the document; `revision` 0: not written yet. `share`, `max_error_excess`: of canaries, else 0."""

    document: bytes
    author: str
    reason: str
    stage: Stage = Stage.LIVE
    share: float = 0.0
    max_error_excess: float = 0.0
    revision: int = 0
    created_at_ms: int = 0


NONE_YET = Revision(b"{}", "", "")


def draft(
    document: bytes,
    author: str,
    reason: str,
    stage: Stage = Stage.LIVE,
    *,
    share: float = 0.0,
    max_error_excess: float = 0.0,
) -> Revision:
    """Make a revision that is not written yet. Raises InvalidRequest."""
    if not 0 < len(author) <= MAX_AUTHOR:
        raise InvalidRequest(f"author has {len(author)} characters, 1 to {MAX_AUTHOR} are needed", param="author")
    if len(reason) > MAX_REASON:
        raise InvalidRequest(f"reason has {len(reason)} characters, the limit is {MAX_REASON}", param="reason")
    if stage is not Stage.CANARY:
        return Revision(document, author, reason, stage)
    if not 0 < share < 1:
        raise InvalidRequest(f"the share of a canary is above 0 and below 1, not {share:g}", param="share")
    if not 0 <= max_error_excess <= 1:
        raise InvalidRequest(f"max_error_excess is from 0 to 1, not {max_error_excess:g}", param="max_error_excess")
    return Revision(document, author, reason, stage, share, max_error_excess or DEFAULT_ERROR_EXCESS)


@dataclass(frozen=True, slots=True)
class History:
    """The last revisions, and always the newest live one."""

    revisions: Mapping[int, Revision] = field(default_factory=dict)

    @property
    def newest(self) -> Revision:
        """The last change, whatever its stage."""
        return self.revisions[max(self.revisions)] if self.revisions else NONE_YET

    @property
    def live(self) -> Revision:
        """What decides."""
        live = [revision for revision in self.revisions.values() if revision.stage is Stage.LIVE]
        return max(live, key=_number, default=NONE_YET)

    @property
    def candidate(self) -> Revision | None:
        """What is being tried."""
        return self.newest if self.newest.stage is not Stage.LIVE else None

    def tried(self) -> bytes:
        """Return the candidate's document. Raises Conflict when there is none."""
        if self.candidate is None:
            raise Conflict("no policy is being tried")
        return self.candidate.document

    def get(self, number: int) -> Revision:
        """Raise NotFound for a revision that never was, or is forgotten."""
        if number not in self.revisions:
            raise NotFound(f"no policy revision {number}; the last {KEPT} are kept", param="revision")
        return self.revisions[number]

    def list(self, limit: int = 0) -> list[Revision]:
        """List the newest first; `limit` 0: all."""
        return sorted(self.revisions.values(), key=_number, reverse=True)[: limit or None]

    def before(self, number: int) -> History:
        """Return what there was before a revision."""
        return History({n: revision for n, revision in self.revisions.items() if n < number})

    def expect(self, number: int | None) -> None:
        """Raise Conflict unless the newest revision is the one that its author knows; None: any."""
        if number is not None and number != self.newest.revision:
            raise Conflict(f"the policy is at revision {self.newest.revision}, not {number}", param="expected_revision")

    def merge(self, other: History) -> History:
        """Join two histories; associative, commutative and idempotent."""
        merged = dict(self.revisions)
        for number, revision in other.revisions.items():
            merged[number] = max(revision, merged.get(number, revision), key=_rank)
        return History(merged).pruned()

    def add(self, revision: Revision) -> History:
        """Add a revision that has its number."""
        return History({**self.revisions, revision.revision: revision}).pruned()

    def pruned(self) -> History:
        """Forget the oldest."""
        if len(self.revisions) <= KEPT:
            return self
        numbers = {*sorted(self.revisions)[-KEPT:], self.live.revision}
        return History({n: revision for n, revision in self.revisions.items() if n in numbers})


def encode_revision(revision: Revision) -> str:
    """Write a record."""
    return json.dumps(asdict(revision) | {"document": revision.document.decode()})


def decode_revision(text: str) -> Revision:
    """Read a record. Raises ValueError, KeyError or TypeError for what is none."""
    fields: dict[str, Any] = json.loads(text)
    return Revision(**fields | {"document": fields["document"].encode(), "stage": Stage(fields["stage"])})


def _rank(revision: Revision) -> tuple[bool, str]:
    """Order revisions of one number, as replicas may make them of a lost store: what decides must not be lost."""
    return revision.stage is Stage.LIVE, repr(revision)


def _number(revision: Revision) -> int:
    return revision.revision
