"""Which workers compute a request: filter, score, pick. Pure: the same view and request always give the same plan.

Decode first, since the request spends its life there; then the prefill worker whose blocks that decode worker can read.
A short prompt is not worth the way through another worker. No prefill worker is no failure either, unless the operator
says so: the decode worker then computes the prompt itself, as many at a time as it is allowed to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from inferflux.errors import KvTransportDegraded, NoWorker
from inferflux.types import Pulse, Role, State
from services.gateway.views import Worker

# guess: how many queued prompt tokens delay a new prompt as much as one more request in front of it.
TOKENS_PER_REQUEST = 512
IDLE = Pulse("", State.READY)
_PREFILL = frozenset({Role.PREFILL})


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker as this gateway sees it now.

    `pulse` None: not connected. `is_fresh` False: no pulse for a moment; it may hang, or this gateway was slow itself.
    `num_assigned`: requests of this gateway, since the last pulse may not show the newest yet. `num_local_prefills`:
    those whose prompts a decode worker computes. `warmth`: share of its capacity to use, less than 1 when it is new.
    `has_suspects`: it runs requests that a worker may have died of. `unreadable_by`: decode workers that found no way
    to its blocks.
    """

    worker: Worker
    pulse: Pulse | None
    is_fresh: bool = True
    num_assigned: int = 0
    num_local_prefills: int = 0
    warmth: float = 1.0
    has_suspects: bool = False
    unreadable_by: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class LocalPrefill:
    """When decode workers compute prompts. `max_body_bytes`: of calls that are short enough for it to be better.

    For want of a prefill worker: at most `max_requests` at a time on one worker, or none if `is_refused`.
    """

    max_body_bytes: int = 0
    max_requests: int = 64
    is_refused: bool = False


@dataclass(frozen=True, slots=True)
class Question:
    """What routing needs to know of a request. `turn` breaks ties, so that equals take turns.

    `avoided`: workers to use only when there is no other. `is_begun`: it has been admitted before and lost its worker.
    `is_suspect`: a worker may have died of it, so it goes where no other such request is, if it can; if `is_on_trial`,
    nowhere else. `adapter`: that the workers must hold. `answerers`: roles of the workers that can answer it.
    """

    model: str
    needs_prefill: bool = True
    avoided: frozenset[str] = frozenset()
    turn: int = 0
    num_body_bytes: int = 1 << 30
    is_begun: bool = False
    is_suspect: bool = False
    is_on_trial: bool = False
    answerers: frozenset[Role] = frozenset({Role.DECODE})
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a worker was or was not chosen. `score` in [0, 1]; None: filtered out."""

    worker_id: str
    score: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The workers chosen. `prefill` None: the decode worker computes the prompt; `why_local` says why.

    `why_local`: short, no_worker, suspect; empty when there is a prefill worker, or nothing to prefill.
    """

    decode: str
    prefill: str | None
    reasons: tuple[Verdict, ...]
    why_local: str = ""


def plan(question: Question, candidates: Sequence[Candidate], local: LocalPrefill = LocalPrefill()) -> Plan:
    """Choose the workers of a request.

    Raises NoWorker when no worker can answer it, KvTransportDegraded when none may compute its prompt.
    """
    decode, verdicts = _choose(question.answerers, candidates, question, reader=None)
    if decode is None:
        name, wanted = question.adapter or question.model, " or ".join(sorted(question.answerers))
        raise NoWorker(f"no {wanted} worker is ready for model {name!r}", retry_after_s=1)
    decode_id = decode.worker.worker_id
    if not question.needs_prefill:
        return Plan(decode_id, None, verdicts)
    if why_local := _why_local(question, local):
        return Plan(decode_id, None, verdicts, why_local)
    prefill, more = _choose(_PREFILL, candidates, question, reader=decode.worker)
    if prefill is not None:
        return Plan(decode_id, prefill.worker.worker_id, verdicts + more)
    if not question.is_begun:
        require_local(decode, local)
    return Plan(decode_id, None, verdicts + more, "no_worker")


def require_local(decode: Candidate, local: LocalPrefill) -> None:
    """Raise KvTransportDegraded unless a decode worker may compute one more prompt for want of a prefill worker."""
    if local.is_refused:
        raise KvTransportDegraded("no prefill worker is ready, and decode workers are not to compute prompts")
    if decode.num_local_prefills >= local.max_requests:
        raise KvTransportDegraded(
            f"no prefill worker is ready, and the decode worker computes {decode.num_local_prefills} prompts already,"
            f" of at most {local.max_requests}"
        )


def another_prefill(question: Question, candidates: Sequence[Candidate], reader: Worker) -> str | None:
    """Choose a prefill worker for a request that keeps its decode worker, among those that it need not avoid."""
    prefill, _ = _choose(_PREFILL, candidates, question, reader)
    return prefill.worker.worker_id if prefill and prefill.worker.worker_id not in question.avoided else None


def _why_local(question: Question, local: LocalPrefill) -> str:
    if question.is_on_trial:
        return "suspect"  # one worker at a time is enough to lose
    return "short" if question.num_body_bytes <= local.max_body_bytes else ""


def _choose(
    roles: frozenset[Role], candidates: Iterable[Candidate], question: Question, reader: Worker | None
) -> tuple[Candidate | None, tuple[Verdict, ...]]:
    pool = [candidate for candidate in candidates if candidate.worker.role in roles]
    objections = [(candidate, objection(candidate, question, reader)) for candidate in pool]
    # When every worker is silent, the silence is more likely ours; and a worker that failed is better than none.
    for preference in (_silence, _bad_memory(question)):
        if any(why is None and preference(candidate) is None for candidate, why in objections):
            objections = [(candidate, why or preference(candidate)) for candidate, why in objections]
    scored = [(score(candidate), candidate) for candidate, why in objections if why is None]
    verdicts = [Verdict(candidate.worker.worker_id, None, why) for candidate, why in objections if why is not None]
    verdicts += [Verdict(candidate.worker.worker_id, value, "load") for value, candidate in scored]
    return _pick(scored, question.turn), tuple(verdicts)


def _silence(candidate: Candidate) -> str | None:
    return None if candidate.is_fresh else "silent"


def _bad_memory(question: Question) -> Callable[[Candidate], str | None]:
    def preference(candidate: Candidate) -> str | None:
        if candidate.worker.worker_id in question.avoided:
            return "was lost"
        return "has suspects" if question.is_suspect and candidate.has_suspects else None

    return preference


def objection(  # noqa: PLR0911 - a list of reasons
    candidate: Candidate, question: Question, reader: Worker | None = None
) -> str | None:
    """Say why a worker can't take a request; None when it can. `reader`: who must read a prefill worker's blocks."""
    worker, pulse = candidate.worker, candidate.pulse
    if worker.model != question.model:
        return "other model"
    if question.adapter and question.adapter not in worker.adapters:
        return "other adapters"
    if pulse is None:
        return "not connected"
    if pulse.state is not State.READY:
        return pulse.state.value
    if worker.role is Role.PREFILL and pulse.num_slots and not pulse.num_free_slots:
        return "arena full"
    if question.is_on_trial and candidate.has_suspects:
        return "has suspects"
    if reader is not None and worker.fingerprint != reader.fingerprint:
        return "incompatible blocks"
    if reader is not None and not reader.can_read(worker):
        return "no common transport"
    if reader is not None and reader.worker_id in candidate.unreadable_by:
        return "no path"
    return None


def score(candidate: Candidate) -> float:
    """Rate a worker by its load: 1 is idle, 1/2 is a full batch (decode) or one request in front (prefill)."""
    pulse = candidate.pulse or IDLE
    num_requests = pulse.num_running + pulse.num_waiting + candidate.num_assigned
    if candidate.worker.role is Role.PREFILL:
        return 1 / (1 + (num_requests + pulse.num_queued_tokens / TOKENS_PER_REQUEST) / candidate.warmth)
    return 1 / (1 + num_requests / max(1, candidate.worker.max_num_seqs * candidate.warmth))


def _pick(scored: Sequence[tuple[float, Candidate]], turn: int) -> Candidate | None:
    if not scored:
        return None
    best = max(value for value, _ in scored)
    equals = sorted((c for value, c in scored if value == best), key=lambda c: c.worker.worker_id)
    return equals[turn % len(equals)]
