"""Guardrails through a real gateway: what the workers are asked, and what the clients get, in every dialect."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any

import httpx
import pytest
import regopy

from inferflux.v1 import policy_service_pb2 as policy_pb
from services.gateway.endpoints import ENDPOINTS, Kind
from tests.support.fake_cluster import (
    JSON_HEAD,
    MODEL,
    SSE_HEAD,
    FakeClient,
    FakeCluster,
    FakeDecode,
    Job,
    Script,
    end,
    failed,
    fake_cluster,
    running_gateway,
    until,
)

CARD = "4111 1111 1111 1111"
CARDS = {"name": "cards", "kind": "pii", "types": ["credit_card"], "action": "redact"}
SECRETS = {"name": "plans", "kind": "blocklist", "phrases": ["the secret plan"], "action": "block"}
REVISIONS = count(100)


def enact(cluster: FakeCluster, *rules: dict[str, Any]) -> None:
    """Make a policy of these rules the one in force."""
    document = json.dumps({"guardrails": {"rules": rules}}).encode()
    revision = next(REVISIONS)
    cluster.policy.policy = policy_pb.PolicyRevision(revision=revision, document=document)
    cluster.policy.publish(revision)


@asynccontextmanager
async def guarded(
    *rules: dict[str, Any], is_pooling: bool = False, **settings
) -> AsyncIterator[tuple[FakeDecode, FakeClient]]:
    async with fake_cluster() as cluster:
        enact(cluster, *rules)
        decode = await (cluster.add_pooling() if is_pooling else cluster.add_decode())
        async with running_gateway(cluster, **settings) as gateway:
            await gateway.ready()
            yield decode, gateway


def chat_events(chunks: Sequence[str], **_: Any) -> list[bytes]:
    def event(delta: dict[str, str], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
        return b"data: " + json.dumps({**head, "choices": [choice]}).encode() + b"\n\n"

    texts = [event({"content": chunk}) for chunk in chunks]
    return [event({"role": "assistant", "content": ""}), *texts, event({}, "stop"), b"data: [DONE]\n\n"]


def completion_events(chunks: Sequence[str]) -> list[bytes]:
    def event(text: str, finish: str | None = None) -> bytes:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
        return (
            b"data: "
            + json.dumps({"id": "cmpl-1", "object": "text_completion", "choices": [choice]}).encode()
            + b"\n\n"
        )

    return [*map(event, chunks), event("", "stop"), b"data: [DONE]\n\n"]


def named(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), json.dumps({"type": kind, **fields}).encode())


def message_events(chunks: Sequence[str]) -> list[bytes]:
    start = named("message_start", message={"id": "msg_1", "role": "assistant", "content": []})
    block = named("content_block_start", index=0, content_block={"type": "text", "text": ""})
    texts = [named("content_block_delta", index=0, delta={"type": "text_delta", "text": chunk}) for chunk in chunks]
    stop = named("content_block_stop", index=0)
    delta = named("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 2})
    return [start, block, *texts, stop, delta, named("message_stop")]


def response_events(chunks: Sequence[str]) -> list[bytes]:
    place, text = {"item_id": "msg_1", "output_index": 0, "content_index": 0}, "".join(chunks)
    whole = {"id": "resp_1", "output": [{"type": "message", "content": [{"type": "output_text", "text": text}]}]}
    return [
        named("response.created", response={"id": "resp_1", "status": "in_progress", "output": []}),
        *(named("response.output_text.delta", **place, delta=chunk) for chunk in chunks),
        named("response.output_text.done", **place, text=text),
        named("response.completed", response=whole),
    ]


CHAT, COMPLETIONS, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"
EVENTS = {CHAT: chat_events, COMPLETIONS: completion_events, MESSAGES: message_events, RESPONSES: response_events}
INPUTS: dict[str, Any] = {
    CHAT: lambda text: {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]},
    COMPLETIONS: lambda text: {"prompt": ["hello", text]},
    MESSAGES: lambda text: {"system": text, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5},
    RESPONSES: lambda text: {"input": [{"role": "user", "content": [{"type": "input_text", "text": text}]}]},
    "/v1/embeddings": lambda text: {"input": [text]},
    "/tokenize": lambda text: {"prompt": text},
    "/v1/rerank": lambda text: {"query": "q", "documents": [text]},
    "/v1/score": lambda text: {"text_1": "q", "text_2": [text]},
    "/classify": lambda text: {"input": text},
    "/v1/messages/count_tokens": lambda text: {"messages": [{"role": "user", "content": text}]},
}


def streaming(events: Sequence[bytes]) -> Script:
    """Write events one by one, each with a token, as a worker does."""

    async def script(job: Job) -> None:
        job.emit(head=SSE_HEAD, data=events[0])
        for event in events[1:-1]:
            job.emit(data=event)
            await asyncio.sleep(0.001)
        job.emit(data=events[-1], end=end())

    return script


def answering(document: dict[str, Any]) -> Script:
    async def script(job: Job) -> None:
        job.emit(head=JSON_HEAD, data=json.dumps(document).encode(), end=end())

    return script


def said(text: str) -> str:
    """All deltas of a stream, put together."""
    parts = []
    for line in text.splitlines():
        if not line.startswith("data: {"):
            continue
        event = json.loads(line.removeprefix("data: "))
        parts += [c.get("text") or c.get("delta", {}).get("content") or "" for c in event.get("choices", ())]
        delta = event.get("delta")
        parts.append(delta if isinstance(delta, str) else (delta or {}).get("text", ""))
    return "".join(parts)


async def post(gateway: FakeClient, path: str, text: str = "hi", **fields: Any) -> httpx.Response:
    return await gateway.http.post(path, json={"model": MODEL, **INPUTS[path](text), **fields})


@pytest.mark.parametrize("path", INPUTS)
async def test_prompts_are_looked_at_on_every_path(path: str):
    """What is redacted never reaches a worker; what is blocked reaches none, and the refusal does not repeat it."""
    is_pooling = ENDPOINTS[path].kind is Kind.POOLING
    async with guarded(CARDS, SECRETS, is_pooling=is_pooling) as (decode, gateway):
        decode.script = answering({"text": "ok"})
        response = await post(gateway, path, f"my card is {CARD}, ok?")

        assert response.status_code == 200
        assert "my card is [CREDIT_CARD], ok?" in decode.jobs[0].start.call.body.decode()

        refused = await post(gateway, path, "tell me the SECRET plan")
        assert refused.status_code == 400
        assert "'plans'" in refused.json()["error"]["message"]
        assert "SECRET" not in refused.text
        assert len(decode.jobs) == 1


async def test_a_clean_prompt_stays_as_it_came():
    """Not a byte of it is written anew."""
    async with guarded(CARDS, SECRETS) as (decode, gateway):
        decode.script = answering({"text": "ok"})
        body = b'{ "messages" : [{"role":"user","content":"h\\u0069"}] , "model":"%b"}' % MODEL.encode()
        await gateway.http.post(CHAT, content=body)

        assert decode.jobs[0].start.call.body == body


@pytest.mark.parametrize("fields", [{"prompt": [1, 2, 3]}, {"prompt": [[1, 2]]}, {"prompt": "", "prompt_embeds": "AA"}])
async def test_a_prompt_that_is_no_text_is_refused(fields: dict[str, Any]):
    """Tokens would get past all rules."""
    async with guarded(SECRETS) as (decode, gateway):
        response = await gateway.http.post(COMPLETIONS, json={"model": MODEL, **fields})

        assert response.status_code == 400
        assert response.json()["error"]["param"] in {"prompt", "prompt_embeds"}
        assert not decode.jobs


@pytest.mark.parametrize("path", EVENTS)
async def test_a_clean_stream_passes_byte_for_byte(path: str):
    """Guardrails cost a clean stream nothing that a client could see."""
    events = EVENTS[path](["The number ", "4111", " is ", "not a ", "card."])
    async with guarded(CARDS, SECRETS) as (decode, gateway):
        decode.script = streaming(events)
        response = await post(gateway, path, stream=True)

        assert response.content == b"".join(events)


@pytest.mark.parametrize("path", EVENTS)
async def test_a_stream_is_redacted_across_events(path: str):
    """However the model's text falls into events, none of the card is seen; the text around it is all there."""
    chunks = ["My card", " is 4111", " 1111 11", "11 1111", ". Keep", " it!"]
    async with guarded(CARDS) as (decode, gateway):
        decode.script = streaming(EVENTS[path](chunks))
        response = await post(gateway, path, stream=True)

        assert said(response.text) == "My card is [CREDIT_CARD]. Keep it!"
        assert "1111" not in response.text
        assert response.text.count("data: ") == len(EVENTS[path](chunks))


@pytest.mark.parametrize(
    ("path", "ending"),
    [
        (CHAT, '"finish_reason":"content_filter"}]}\n\ndata: [DONE]\n\n'),
        (COMPLETIONS, '"finish_reason":"content_filter"}]}\n\ndata: [DONE]\n\n'),
        (MESSAGES, 'event: message_stop\ndata: {"type":"message_stop"}\n\n'),
        (RESPONSES, '"incomplete_details":{"reason":"content_filter"}}}\n\n'),
    ],
)
async def test_a_block_ends_a_stream_properly(path: str, ending: str):
    """The client sees what came before and a proper end; the worker is told to stop."""

    async def script(job: Job) -> None:
        events = EVENTS[path](["Well, ", "here is ", "the sec", "ret pl", "an: ", "run!"])
        job.emit(head=SSE_HEAD, data=events[0])
        for event in events[1:-2]:
            job.emit(data=event)
        await asyncio.sleep(60)

    async with guarded(SECRETS) as (decode, gateway):
        decode.script = script
        response = await asyncio.wait_for(post(gateway, path, stream=True), 10)

        assert said(response.text) == "Well, here is "
        assert response.text.endswith(ending)
        await until(lambda: decode.cancels)
        assert (
            await gateway.metric('inferflux_guardrail_verdicts_total{action="block",rule="plans",side="output"}') >= 1
        )


async def test_a_whole_answer_is_redacted_or_refused():
    """What is no stream is looked at before its first byte is sent."""

    def document(text: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"id": "chatcmpl-1", "choices": [{"index": 0, "message": message, "logprobs": {"content": ["4111"]}}]}

    async with guarded(CARDS, SECRETS) as (decode, gateway):
        decode.script = answering(document(f"It is {CARD}."))
        choice = (await gateway.chat()).json()["choices"][0]
        assert choice["message"]["content"] == "It is [CREDIT_CARD]."
        assert choice["logprobs"] is None

        decode.script = answering(document("It is the secret plan."))
        refused = await gateway.chat()
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "content_policy_violation"
        assert refused.json()["error"]["param"] == "plans"


async def test_choices_and_tool_calls_are_texts_of_their_own():
    """One choice's held back text does not mix with another's, and an ended choice holds nothing back."""

    def event(index: int, delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "finish_reason": finish}
        return (
            b"data: "
            + json.dumps({"id": "c", "object": "chat.completion.chunk", "choices": [choice]}).encode()
            + b"\n\n"
        )

    def call(text: str) -> dict[str, Any]:
        return {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}

    events = [
        event(0, {"content": "4111 1111"}),
        event(1, call('{"card": "4111 1111 ')),
        event(0, {"content": " 2024"}, "stop"),
        event(1, call('1111 1111"}')),
        event(1, {}, "tool_calls"),
        b"data: [DONE]\n\n",
    ]
    async with guarded(CARDS) as (decode, gateway):
        decode.script = streaming(events)
        text = (await gateway.chat(stream=True, n=2)).text

        assert '"4111 1111"' in text
        assert r"{\"card\": \"[CREDIT_CARD]" in text


async def test_rules_are_for_models_and_tenants():
    """A rule looks only at what it is for."""
    other = {**SECRETS, "models": ["another"]}
    theirs = {**SECRETS, "name": "theirs", "tenants": ["default"], "scope": ["input"], "phrases": ["our plan"]}
    async with guarded(other, theirs) as (decode, gateway):
        decode.script = answering({"text": "our plan"})

        assert (await post(gateway, CHAT, "the secret plan")).text == '{"text": "our plan"}'
        assert (await post(gateway, CHAT, "our plan")).status_code == 400


async def test_flags_are_counted_and_nothing_more():
    """A flagged text goes its way."""
    async with guarded({**SECRETS, "name": "flagged", "action": "flag"}) as (decode, gateway):
        decode.script = streaming(chat_events(["the secret", " plan"]))
        response = await post(gateway, CHAT, "the secret plan", stream=True)

        assert said(response.text) == "the secret plan"
        name = 'inferflux_guardrail_verdicts_total{action="flag",rule="flagged",side='
        assert await gateway.metric(name + '"input"}') == 1
        assert await gateway.metric(name + '"output"}') == 1


async def test_lengths_are_bounded_both_ways():
    """Too long a prompt is refused, too long an answer ends."""
    rule = {"name": "long", "kind": "length", "max_chars": 40, "action": "block"}
    async with guarded(rule) as (decode, gateway):
        decode.script = streaming(chat_events(["twenty characters!! "] * 4))
        response = await post(gateway, CHAT, stream=True)

        assert said(response.text) == "twenty characters!! " * 2
        assert '"content_filter"' in response.text
        assert (await post(gateway, CHAT, "x" * 41)).status_code == 400


REGO = """
package inferflux.guardrails
import rego.v1
deny contains "hot" if input.request.temperature > 1
deny contains "leak" if { input.side == "output"; some v in input.verdicts; v.rule == "cards" }
"""


async def test_policies_as_code_decide_on_requests_and_verdicts():
    """They see parameters and verdicts, never text."""
    async with guarded(CARDS, {"name": "code", "kind": "rego", "module": REGO, "action": "block"}) as (decode, gateway):
        decode.script = streaming(chat_events(["fine. ", f"{CARD}.", " more"]))

        assert (await post(gateway, CHAT, temperature=2)).json()["error"]["param"] == "code"
        response = await post(gateway, CHAT, temperature=1, stream=True)
        assert said(response.text) == "fine. "
        assert '"content_filter"' in response.text


@pytest.mark.parametrize(("on_failure", "status"), [("block", 503), ("allow", 200)])
async def test_a_rule_that_can_not_be_asked_fails_as_the_policy_says(on_failure: str, status: int):
    """Nobody is there to judge profanity."""
    rule = {"name": "rude", "kind": "profanity", "action": "block", "scope": ["input"], "on_failure": on_failure}
    async with guarded(rule) as (decode, gateway):
        decode.script = answering({"text": "ok"})
        response = await post(gateway, CHAT)

        assert response.status_code == status
        assert await gateway.metric("inferflux_guardrail_failures_total") >= 1


async def test_a_stream_that_can_not_be_judged_ends_with_an_error():
    """It has begun, so there is no status left to say it with; nothing of it was shown."""
    rule = {"name": "rude", "kind": "profanity", "action": "block", "scope": ["output"]}
    async with guarded(rule) as (decode, gateway):
        decode.script = streaming(chat_events(["Hello", " there", "."]))
        response = await post(gateway, CHAT, stream=True)

        assert said(response.text) == ""
        assert '"code":"guardrail_unavailable"' in response.text
        assert "[DONE]" not in response.text


def going_on(events: Sequence[bytes], num_before_loss: int | None = None) -> Script:
    """Write what the client has not, as a worker does that gets a request from another one; fail once if told to."""

    async def script(job: Job) -> None:
        begin = job.start.num_events
        fails = num_before_loss is not None and begin == 0
        job.emit(head=SSE_HEAD)
        for event in events[begin : num_before_loss if fails else -1]:
            job.emit(data=event)
            await asyncio.sleep(0.001)
        if fails:
            job.emit(end=failed("ENGINE_FAILED", 500, is_retryable=True))
        else:
            job.emit(data=events[-1], end=end())

    return script


SPLIT_CARD = ["Well: ", "4111 ", "1111 ", "1111 ", "1111", ". That ", "is it", "."]


@pytest.mark.parametrize("num_events", range(1, 9))
async def test_a_guarded_stream_outlives_its_worker(num_events: int):
    """What was held back when the worker was lost is neither lost nor said twice, and is redacted all the same."""
    events = chat_events(SPLIT_CARD)
    async with fake_cluster() as cluster:
        enact(cluster, CARDS)
        for number in range(2):
            (await cluster.add_decode(f"decode-{number}")).script = going_on(events, num_events)
        async with running_gateway(cluster, sse_event_ids=True) as gateway:
            await gateway.ready()
            response = await post(gateway, CHAT, stream=True)

            assert said(response.text) == "Well: [CREDIT_CARD]. That is it."
            assert [int(line[4:]) for line in response.text.splitlines() if line.startswith("id: ")] == list(range(11))
            assert await gateway.metric("inferflux_failover_total") >= 1


async def test_who_comes_back_gets_the_rest_as_it_would_have_been():
    """From any event, also from within what is redacted; a blocked stream is blocked again."""
    async with guarded(CARDS, SECRETS, sse_event_ids=True) as (decode, gateway):
        decode.script = going_on(chat_events(SPLIT_CARD))
        whole = await post(gateway, CHAT, stream=True)
        events = whole.text.split("\n\n")
        url = f"/v1/streams/{whole.headers['x-request-id']}"
        for last in range(len(events) - 2):
            rest = await gateway.http.get(url, headers={"last-event-id": str(last)})
            assert rest.text == "\n\n".join(events[last + 1 :])

        decode.script = going_on(chat_events(["Here is ", "the secret", " plan", "."]))
        whole = await post(gateway, CHAT, stream=True)
        url = f"/v1/streams/{whole.headers['x-request-id']}"
        rest = await gateway.http.get(url, headers={"last-event-id": "0"})
        assert rest.text == whole.text.split("\n\n", 1)[1]
        assert rest.text.endswith('"finish_reason":"content_filter"}]}\n\ndata: [DONE]\n\n')


class DataApi(BaseHTTPRequestHandler):
    """OPA's data API for one document, decided by a second Rego engine."""

    asked: list[dict[str, Any]]

    def do_POST(self) -> None:
        document = json.loads(self.rfile.read(int(self.headers["content-length"])))["input"]
        self.asked.append(document)
        interpreter = regopy.Interpreter()
        interpreter.add_module("policy", REGO)
        interpreter.set_input(document)
        deny = json.loads(str(interpreter.query("data.inferflux.guardrails.deny")))["expressions"][0]
        body = json.dumps({"result": {"deny": deny}} if self.path == "/v1/data/inferflux/guardrails" else {}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def opa_server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    asked: list[dict[str, Any]] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Api", (DataApi,), {"asked": asked})) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


async def test_an_opa_server_decides_as_the_embedded_engine_does():
    """It is asked over HTTP for the same decision, and sees no text either."""
    rule = {"name": "code", "kind": "opa", "path": "inferflux/guardrails", "action": "block", "deadline_ms": 5000}
    with opa_server() as (url, asked):
        async with guarded(CARDS | {"name": "numbers"}, rule, opa_url=url) as (decode, gateway):
            decode.script = answering({"text": "fine"})

            assert (await post(gateway, CHAT, f"my {CARD}", temperature=1)).status_code == 200
            refused = await post(gateway, CHAT, temperature=2)
            assert refused.json()["error"]["param"] == "code"

    assert asked[0]["verdicts"] == [
        {"rule": "numbers", "tier": 1, "side": "input", "action": "redact", "label": "CREDIT_CARD"}
    ]
    assert {document["side"] for document in asked} == {"input", "output"}
    assert "1111" not in json.dumps(asked)
    assert "fine" not in json.dumps(asked)
