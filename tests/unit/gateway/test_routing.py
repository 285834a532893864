"""Routing is a pure function, so its promises are checked over arbitrary clusters."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from inferflux.errors import KvTransportDegraded, NoWorker
from inferflux.types import ModelFingerprint, Pulse, Role, State, Transport
from services.gateway.routing import Candidate, LocalPrefill, Question, another_prefill, objection, plan, score
from services.gateway.views import Worker

MODEL = "tiny"
BOTH = frozenset(Transport)
FINGERPRINTS = tuple(ModelFingerprint(digest, "float32", "l", 16) for digest in ("a", "b"))
QUESTION = Question(MODEL)


def worker(worker_id: str, role: Role = Role.DECODE, **fields) -> Worker:
    defaults = {"model": MODEL, "fingerprint": FINGERPRINTS[0], "host_id": "here", "max_num_seqs": 8}
    return Worker(worker_id, "1", role, address="", state=State.READY, **{**defaults, **fields})


def pulse(state: State = State.READY, **load) -> Pulse:
    return Pulse("1", state, **{"num_slots": 8, "num_free_slots": 8, **load})


def decode(worker_id: str = "decode-0", *, num_assigned: int = 0, is_fresh: bool = True, **load) -> Candidate:
    return Candidate(worker(worker_id), pulse(**load), is_fresh, num_assigned)


def prefill(worker_id: str = "prefill-0", *, load=None, **fields) -> Candidate:
    return Candidate(worker(worker_id, Role.PREFILL, **fields), pulse(**(load or {})))


LOADS = st.integers(0, 50)


@st.composite
def pulses(draw):
    num_slots = draw(st.sampled_from([0, 8]))
    return pulse(
        draw(st.sampled_from(State)),
        num_running=draw(LOADS),
        num_waiting=draw(LOADS),
        num_queued_tokens=draw(st.integers(0, 100_000)),
        num_slots=num_slots,
        num_free_slots=draw(st.integers(0, num_slots)),
    )


@st.composite
def candidates(draw):
    """Any worker, in any condition; its id is set by `clusters`."""
    made = worker(
        "",
        draw(st.sampled_from(Role)),
        model=draw(st.sampled_from([MODEL, MODEL, "other"])),
        fingerprint=draw(st.sampled_from(FINGERPRINTS)),
        host_id=draw(st.sampled_from(["here", "there"])),
        transports=draw(st.frozensets(st.sampled_from(Transport))),
        max_num_seqs=draw(st.integers(0, 64)),
    )
    return Candidate(
        made,
        draw(st.none() | pulses()),
        is_fresh=draw(st.booleans()),
        num_assigned=draw(LOADS),
        warmth=draw(st.sampled_from([0.05, 1.0])),
        has_suspects=draw(st.booleans()),
    )


def named(drawn: list[Candidate]) -> list[Candidate]:
    return [replace(c, worker=replace(c.worker, worker_id=f"{c.worker.role}-{i}")) for i, c in enumerate(drawn)]


clusters = st.lists(candidates(), max_size=6).map(named)
questions = st.builds(
    Question,
    st.just(MODEL),
    st.booleans(),
    st.frozensets(st.builds("{}-{}".format, st.sampled_from(Role), st.integers(0, 5)), max_size=3),
    st.integers(0, 1000),
    is_on_trial=st.booleans(),
    answerers=st.sampled_from([{Role.DECODE}, {Role.POOLING}, {Role.DECODE, Role.POOLING}]).map(frozenset),
)


def planned(question, cluster):
    """Plan, and look the chosen workers up."""
    try:
        made = plan(question, cluster)
    except NoWorker:
        return None, None, None
    by_id = {c.worker.worker_id: c for c in cluster}
    return made, by_id[made.decode], by_id[made.prefill] if made.prefill else None


@given(questions, clusters)
def test_only_workers_that_can_take_the_request_are_chosen(question, cluster):
    """Never of another model or role, never unconnected or not ready; on trial, never beside a suspect."""
    _, *chosen = planned(question, cluster)
    for roles, candidate in zip((question.answerers, {Role.PREFILL}), chosen, strict=True):
        if candidate is not None:
            assert candidate.worker.role in roles
            assert candidate.worker.model == question.model
            assert not (question.is_on_trial and candidate.has_suspects)
            assert candidate.pulse is not None
            assert candidate.pulse.state is State.READY


@given(questions, clusters)
def test_prefill_only_where_decode_can_read_the_blocks(question, cluster):
    """Same fingerprint and a common transport, with room in the arena, and only for calls with a prompt."""
    _, decoder, prefiller = planned(question, cluster)
    if prefiller is not None:
        assert question.needs_prefill
        assert prefiller.worker.fingerprint == decoder.worker.fingerprint
        common = prefiller.worker.transports & decoder.worker.transports
        assert common if prefiller.worker.host_id == decoder.worker.host_id else Transport.NIXL in common
        assert prefiller.pulse.num_free_slots or not prefiller.pulse.num_slots


@given(questions, clusters)
def test_there_is_a_plan_exactly_when_a_worker_can_take_the_request(question, cluster):
    """Prefill workers alone serve nothing; a worker of the right role alone serves everything."""
    usable = [c for c in cluster if c.worker.role in question.answerers and objection(c, question) is None]

    assert (planned(question, cluster)[0] is not None) == bool(usable)


@given(clusters)
def test_no_prefill_worker_is_left_out_without_a_reason(cluster):
    """If the prompt is computed by decode, no prefill worker could have done it."""
    made, decoder, prefiller = planned(QUESTION, [decode("decode-9"), *cluster])
    prefills = [c for c in cluster if c.worker.role is Role.PREFILL]

    assert made is not None
    assert prefiller is not None or all(objection(c, QUESTION, decoder.worker) for c in prefills)


@given(questions, clusters)
def test_the_less_loaded_of_the_usable_workers_is_chosen(question, cluster):
    """Of those that pulse on time nobody usable has a better score; the silent, and then the avoided, are for need."""
    _, decoder, prefiller = planned(question, cluster)
    reads = decoder.worker if decoder else None
    for chosen, roles, reader in ((decoder, question.answerers, None), (prefiller, {Role.PREFILL}, reads)):
        if chosen is not None:
            peers = [c for c in cluster if c.worker.role in roles and not objection(c, question, reader)]
            peers = [c for c in peers if c.is_fresh] or peers
            peers = [c for c in peers if c.worker.worker_id not in question.avoided] or peers
            assert chosen in peers
            assert score(chosen) == max(map(score, peers))


@given(candidates(), st.sampled_from(["num_running", "num_waiting", "num_queued_tokens"]), st.integers(1, 100))
def test_more_load_is_never_a_better_score(candidate, what, more):
    """Scores lie in (0, 1], and no kind of load raises one."""
    assume(candidate.pulse is not None)
    busier = replace(candidate, pulse=replace(candidate.pulse, **{what: getattr(candidate.pulse, what) + more}))
    fuller = replace(candidate, num_assigned=candidate.num_assigned + more)

    assert 0 < score(busier) <= score(candidate) <= 1
    assert score(fuller) < score(candidate)


@given(clusters)
def test_verdicts_agree_with_the_choice(cluster):
    """Each worker has at most one; who was chosen has a score, who was filtered has none."""
    made, decoder, _ = planned(QUESTION, [decode("decode-9"), *cluster])
    verdicts = {verdict.worker_id: verdict for verdict in made.reasons}
    asked = [c for c in cluster if c.worker.role is not Role.POOLING]
    filtered = [c for c in asked if objection(c, QUESTION, decoder.worker if c.worker.role is Role.PREFILL else None)]

    assert len(verdicts) == len(made.reasons)
    assert all(verdicts[chosen].score is not None for chosen in (made.decode, made.prefill) if chosen)
    assert all(verdicts[c.worker.worker_id].score is None for c in filtered)


def test_a_worker_passed_over_for_its_silence_has_a_verdict():
    """An operator who asks why a worker gets no requests finds it in the reasons."""
    made = plan(QUESTION, [decode("silent", is_fresh=False), decode("fresh")])

    assert {verdict.worker_id for verdict in made.reasons} == {"silent", "fresh"}


@given(questions, clusters)
def test_the_same_question_has_the_same_answer(question, cluster):
    """Pure, and the order in which workers are known does not matter."""
    made, backwards = planned(question, cluster)[0], planned(question, cluster[::-1])[0]

    assert (made and (made.decode, made.prefill)) == (backwards and (backwards.decode, backwards.prefill))


def test_equals_take_turns():
    """Idle workers share requests evenly."""
    cluster = [decode(f"decode-{i}") for i in range(3)]

    chosen = [plan(replace(QUESTION, turn=turn), cluster).decode for turn in range(6)]

    assert chosen == ["decode-0", "decode-1", "decode-2"] * 2


def test_requests_on_their_way_count_before_the_next_pulse_shows_them():
    """A burst between two pulses does not all go to one worker."""
    cluster = [decode("decode-0", num_assigned=1), decode("decode-1")]

    assert {plan(replace(QUESTION, turn=turn), cluster).decode for turn in range(4)} == {"decode-1"}


def test_a_large_worker_takes_more_than_a_small_one():
    """Decode load is relative to the batch that fits."""
    small = Candidate(worker("small", max_num_seqs=4), pulse(num_running=3))
    large = Candidate(worker("large", max_num_seqs=64), pulse(num_running=10))

    assert plan(QUESTION, [small, large]).decode == "large"


def test_queued_prompt_tokens_weigh_on_prefill_workers():
    """One long prompt in front is worse than one short request."""
    long = prefill("long", load={"num_waiting": 1, "num_queued_tokens": 8000})
    short = prefill("short", load={"num_waiting": 2, "num_queued_tokens": 100})

    assert plan(QUESTION, [decode(), long, short]).prefill == "short"


def test_a_silent_worker_is_avoided_unless_all_are_silent():
    """One silent worker may hang; when all are silent, the silence is more likely ours."""
    silent, busy = decode("silent", is_fresh=False), decode("busy", num_running=8)

    assert plan(QUESTION, [silent, busy]).decode == "busy"
    assert plan(QUESTION, [silent, replace(busy, is_fresh=False)]).decode == "silent"


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (Candidate(worker("w", model="other"), pulse()), "other model"),
        (Candidate(worker("w"), None), "not connected"),
        (decode("w", state=State.DRAINING), "draining"),
        (decode("w", state=State.FAILED), "failed"),
        (prefill("w", load={"num_free_slots": 0}), "arena full"),
        (prefill("w", fingerprint=FINGERPRINTS[1]), "incompatible blocks"),
        (prefill("w", host_id="there"), "no common transport"),
        (prefill("w", host_id="there", transports=BOTH), None),
        (prefill("w", transports=frozenset({Transport.NIXL})), None),
        (prefill("w", transports=frozenset()), "no common transport"),
        (prefill("w", load={"num_slots": 0, "num_free_slots": 0}), None),
        (decode("w"), None),
    ],
)
def test_objections(candidate, reason):
    """Each has its name, which is what operators read."""
    reader = worker("decode-9", transports=BOTH) if candidate.worker.role is Role.PREFILL else None

    assert objection(candidate, QUESTION, reader) == reason


def test_utility_calls_need_no_prefill_worker():
    """They go straight to a decode worker."""
    assert plan(Question(MODEL, needs_prefill=False), [decode(), prefill()]).prefill is None


def test_no_decode_worker_is_a_retryable_refusal():
    """With the time after which to ask again."""
    with pytest.raises(NoWorker) as raised:
        plan(QUESTION, [prefill(), decode(state=State.STARTING)])

    assert raised.value.is_retryable
    assert raised.value.retry_after_s


def test_a_worker_that_was_lost_is_used_only_when_there_is_no_other():
    """A worker that came back is better than none."""
    question = replace(QUESTION, avoided=frozenset({"lost"}))

    assert plan(question, [decode("lost"), decode("busy", num_running=8)]).decode == "busy"
    assert plan(question, [decode("lost")]).decode == "lost"


def test_suspects_keep_apart_if_they_can_and_on_trial_even_if_they_cannot():
    """So that the next death has one suspect."""
    crowded, busy = replace(decode("crowded"), has_suspects=True), decode("busy", num_running=8)
    suspect = replace(QUESTION, is_suspect=True)

    assert plan(suspect, [crowded, busy]).decode == "busy"
    assert plan(suspect, [crowded]).decode == "crowded"
    with pytest.raises(NoWorker):
        plan(replace(suspect, is_on_trial=True), [crowded])


def test_a_worker_that_has_just_come_is_filled_slowly():
    """It takes the first request like any other, and then counts as a small worker."""
    cold, warm = replace(decode("cold"), warmth=0.05), decode("warm")

    assert score(cold) == score(warm)
    assert plan(QUESTION, [replace(cold, num_assigned=1), replace(warm, num_assigned=3)]).decode == "warm"


@pytest.mark.parametrize(("num_bytes", "chosen"), [(100, (None, "short")), (101, ("prefill-0", ""))])
def test_short_prompts_are_computed_by_decode(num_bytes, chosen):
    """They are not worth the way through another worker."""
    made = plan(replace(QUESTION, num_body_bytes=num_bytes), [decode(), prefill()], LocalPrefill(max_body_bytes=100))

    assert (made.prefill, made.why_local) == chosen


def test_without_a_prefill_worker_decode_computes_as_many_prompts_as_it_may():
    """More are refused before any work; what runs already is not."""
    local = LocalPrefill(max_requests=2)
    full = replace(decode(), num_local_prefills=2)

    assert plan(QUESTION, [replace(full, num_local_prefills=1)], local).why_local == "no_worker"
    with pytest.raises(KvTransportDegraded, match="2 prompts already, of at most 2"):
        plan(QUESTION, [full], local)
    assert plan(replace(QUESTION, is_begun=True), [full], local).why_local == "no_worker"


def test_without_a_prefill_worker_an_operator_may_want_none():
    """Then new requests are refused, with an error to come back for; short prompts are still computed."""
    local = LocalPrefill(max_body_bytes=100, is_refused=True)

    with pytest.raises(KvTransportDegraded) as raised:
        plan(QUESTION, [decode()], local)
    assert raised.value.is_retryable
    assert plan(replace(QUESTION, num_body_bytes=1), [decode()], local).why_local == "short"


def test_a_lost_prefill_worker_is_replaced_by_another_one_and_not_by_itself():
    """If there is one whose blocks the decode worker can read."""
    question, reader = replace(QUESTION, avoided=frozenset({"prefill-0"})), worker("decode-0")

    assert another_prefill(question, [prefill("prefill-0"), prefill("prefill-1")], reader) == "prefill-1"
    assert another_prefill(question, [prefill("prefill-0"), prefill("far", host_id="there")], reader) is None
