"""The policy in force, compiled: what requests are checked against, from memory alone.

A document is read once per revision of it, not once per snapshot or request. A snapshot that the policy service did not
sign changes nothing. A signed one with a document that this gateway can't read, because it is older than the service,
changes keys only: revocations must get through. While there is no document to keep, it changes nothing, since an empty
one would allow everything.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field

from inferflux.errors import PolicyInvalid
from inferflux.policy.audit import AuditSection
from inferflux.policy.document import EMPTY, PolicyDocument, parse
from inferflux.policy.identity import Identity, Issuer, compile_identity
from inferflux.policy.limits import Limits, compile_limits
from inferflux.telemetry import metrics
from services.gateway.auth import KeyRing
from services.gateway.guardrails.rules import Guardrails, compile_guardrails

_SCALE = 1 << 64
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Policy:
    """One revision of the document, each member made of its section by the section's owner; None: no restriction."""

    revision: int = 0
    document: PolicyDocument = field(default_factory=PolicyDocument)
    identity: Identity = field(default_factory=Identity)
    limits: Limits | None = None
    guardrails: Guardrails | None = None
    audit: AuditSection | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """A revision of the document as it came. `share`: of the traffic that it decides for; 0: in shadow, 1: live."""

    revision: int = 0
    document: bytes = EMPTY
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Policies:
    """A whole snapshot: the keys, the policy that decides, and the one that is being tried.

    `candidate_revision`: of the one that shall be tried, 0: none; then `candidate` is None only if it can't be read.
    """

    revision: int
    keys: KeyRing
    live: Policy = field(default_factory=Policy)
    candidate: Policy | None = None
    share: float = 0.0
    candidate_revision: int = 0

    def choose(self, credential: bytes) -> Policy:
        """Choose what decides for a client: always the same as long as the candidate and its share are the same."""
        if self.candidate is None or not self.share:
            return self.live
        return self.candidate if _fraction(self.candidate.revision, credential) < self.share else self.live

    @property
    def issuers(self) -> list[Issuer]:
        """All issuers of tokens that some client's policy names."""
        policies = [self.live, *([self.candidate] if self.candidate is not None else [])]
        return [issuer for policy in policies for issuer in policy.identity.issuers.values()]

    @property
    def shadow(self) -> Policy | None:
        """What is only reported on."""
        return self.candidate if not self.share else None


def identity_of(policies: Policies | None, credential: bytes) -> Identity:
    """Return what a client's policy knows of tenants, roles and issuers."""
    return policies.choose(credential).identity if policies is not None else Identity()


def limits_of(policies: Policies | None) -> Limits | None:
    """Return the limits that are live."""
    return policies.live.limits if policies is not None else None


def compile_policy(source: Source) -> Policy:
    """Read a document and prepare it for requests. Raises PolicyInvalid."""
    document = parse(source.document)
    return Policy(
        revision=source.revision,
        document=document,
        identity=compile_identity(document.identity),
        limits=compile_limits(document.limits),
        guardrails=compile_guardrails(document.guardrails),
        audit=document.audit,
    )


class Compiler:
    """Makes Policies of snapshots, and remembers what it has compiled."""

    def __init__(self) -> None:
        self._live: Policy | None = None
        self._candidate: Policy | None = None

    def compile(self, revision: int, keys: KeyRing, live: Source, candidate: Source | None = None) -> Policies:
        """Take a signed snapshot. Raises PolicyInvalid when there is no live policy, not even an older one."""
        self._live = self._compiled(live) or self._live
        if self._live is None:
            raise PolicyInvalid(f"revision {live.revision} of the policy can't be read here")
        self._candidate = self._compiled(candidate) if candidate is not None else None
        if candidate is None:
            return Policies(revision, keys, self._live)
        return Policies(revision, keys, self._live, self._candidate, candidate.share, candidate.revision)

    def _compiled(self, source: Source) -> Policy | None:
        """Return the policy of a source; None, counted, when it can't be read."""
        for known in (self._live, self._candidate):
            if known is not None and known.revision == source.revision:
                return known
        try:
            return compile_policy(source)
        except PolicyInvalid as e:
            metrics.POLICY_REFUSED.labels("document").inc()
            _log.error("refused a policy", extra={"policy_revision": source.revision, "reason": e.message})
            return None


def _fraction(revision: int, credential: bytes) -> float:
    """Map a credential to [0, 1), anew for each candidate, so that it is not always the same clients who try."""
    digest = hashlib.blake2b(credential, digest_size=8, key=str(revision).encode()).digest()
    return int.from_bytes(digest) / _SCALE
