"""Which workers compute a request: filter, score, pick. Pure: the same view and request always give the same plan.

Decode first, since the request spends its life there; then the prefill worker whose blocks that decode worker can read.
No prefill worker is no failure: the decode worker then computes the prompt itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from inferflux.errors import NoWorker
from inferflux.types import Pulse, Role, State
from services.gateway.views import Worker

# guess: how many queued prompt tokens delay a new prompt as much as one more request in front of it.
TOKENS_PER_REQUEST = 512
IDLE = Pulse("", State.READY)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker as this gateway sees it now.

    `pulse` None: not connected. `is_fresh` False: no pulse for a moment; it may hang, or this gateway was slow itself.
    `num_assigned`: requests of this gateway, since the last pulse may not show the newest yet.
    """

    worker: Worker
    pulse: Pulse | None
    is_fresh: bool = True
    num_assigned: int = 0


@dataclass(frozen=True, slots=True)
class Question:
    """What routing needs to know of a request. `turn` breaks ties, so that equals take turns."""

    model: str
    needs_prefill: bool = True
    excluded: frozenset[str] = frozenset()
    turn: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a worker was or was not chosen. `score` in [0, 1]; None: filtered out."""

    worker_id: str
    score: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The workers chosen. `prefill` None: the decode worker computes the prompt."""

    decode: str
    prefill: str | None
    reasons: tuple[Verdict, ...]


def plan(question: Question, candidates: Sequence[Candidate]) -> Plan:
    """Choose the workers of a request. Raises NoWorker when no decode worker can take it."""
    decode, verdicts = _choose(Role.DECODE, candidates, question, reader=None)
    if decode is None:
        raise NoWorker(f"no decode worker is ready for model {question.model!r}", retry_after_s=1)
    if not question.needs_prefill:
        return Plan(decode.worker_id, None, verdicts)
    prefill, more = _choose(Role.PREFILL, candidates, question, reader=decode)
    return Plan(decode.worker_id, prefill.worker_id if prefill else None, verdicts + more)


def _choose(
    role: Role, candidates: Iterable[Candidate], question: Question, reader: Worker | None
) -> tuple[Worker | None, tuple[Verdict, ...]]:
    pool = [candidate for candidate in candidates if candidate.worker.role is role]
    objections = [(candidate, objection(candidate, question, reader)) for candidate in pool]
    # When every worker is silent, the silence is more likely ours.
    if any(why is None and candidate.is_fresh for candidate, why in objections):
        objections = [(c, why or (None if c.is_fresh else "silent")) for c, why in objections]
    scored = [(score(candidate), candidate.worker) for candidate, why in objections if why is None]
    verdicts = [Verdict(candidate.worker.worker_id, None, why) for candidate, why in objections if why is not None]
    verdicts += [Verdict(worker.worker_id, value, "load") for value, worker in scored]
    return _pick(scored, question.turn), tuple(verdicts)


def objection(  # noqa: PLR0911 - a list of reasons
    candidate: Candidate, question: Question, reader: Worker | None = None
) -> str | None:
    """Say why a worker can't take a request; None when it can. `reader`: who must read a prefill worker's blocks."""
    worker, pulse = candidate.worker, candidate.pulse
    if worker.worker_id in question.excluded:
        return "was lost"
    if worker.model != question.model:
        return "other model"
    if pulse is None:
        return "not connected"
    if pulse.state is not State.READY:
        return pulse.state.value
    if worker.role is Role.PREFILL and pulse.num_slots and not pulse.num_free_slots:
        return "arena full"
    if reader is not None and worker.fingerprint != reader.fingerprint:
        return "incompatible blocks"
    if reader is not None and worker.host_id != reader.host_id:
        return "other host"
    return None


def score(candidate: Candidate) -> float:
    """Rate a worker by its load: 1 is idle, 1/2 is a full batch (decode) or one request in front (prefill)."""
    pulse = candidate.pulse or IDLE
    num_requests = pulse.num_running + pulse.num_waiting + candidate.num_assigned
    if candidate.worker.role is Role.PREFILL:
        return 1 / (1 + num_requests + pulse.num_queued_tokens / TOKENS_PER_REQUEST)
    return 1 / (1 + num_requests / max(1, candidate.worker.max_num_seqs))


def _pick(scored: Sequence[tuple[float, Worker]], turn: int) -> Worker | None:
    if not scored:
        return None
    best = max(value for value, _ in scored)
    equals = sorted((worker for value, worker in scored if value == best), key=lambda worker: worker.worker_id)
    return equals[turn % len(equals)]
