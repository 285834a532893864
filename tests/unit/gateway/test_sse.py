"""How a stream ends that can't end well."""

from __future__ import annotations

import json

import pytest

from inferflux.errors import DeadlineExceeded, Internal, NoWorker, WorkerLost
from inferflux.types import HttpAnswer, HttpHead
from services.gateway import sse
from services.gateway.endpoints import Dialect
from services.gateway.reply import Reply

ID = "req_1"
STREAM = HttpHead(200, (("content-type", "text/event-stream; charset=utf-8"), ("x-request-id", "theirs")))
WHOLE = HttpHead(200, (("content-type", "application/json"), ("content-length", "999"), ("set-cookie", "no")))


class Wire:
    """What a client sees of a reply."""

    def __init__(self, dialect: Dialect = Dialect.OPENAI) -> None:
        self.messages: list[dict] = []
        self.reply = Reply(self._send, ID, dialect, [(b"x-request-id", ID.encode())])

    async def _send(self, message) -> None:
        assert not self.messages or self.messages[-1].get("more_body", True), "written after its end"
        assert (message["type"] == "http.response.start") == (not self.messages)
        self.messages.append(message)

    @property
    def status(self) -> int:
        return self.messages[0]["status"]

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return self.messages[0]["headers"]

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.messages[1:])

    @property
    def is_complete(self) -> bool:
        return bool(self.messages) and not self.messages[-1].get("more_body", False)


def events(body: bytes) -> list[tuple[str, dict]]:
    """Parse an event stream strictly: each event ends with an empty line."""
    assert body.endswith(b"\n\n")
    parsed = []
    for block in body.decode().removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        parsed.append((fields.get("event", ""), json.loads(fields["data"])))
    return parsed


@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize("error", [WorkerLost("gone"), DeadlineExceeded("late"), Internal('a "quote"\n\nevent: fake')])
def test_the_error_event_is_one_event_and_no_done(dialect, error):
    """Whatever is in its message; and it says whether trying again makes sense."""
    data = sse.error_event(error, dialect, ID)
    [(name, document)] = events(data)

    assert name == document["type"] == "error"
    assert document["error"]["message"] == error.message
    assert document["error"]["code"] == error.reason.lower()
    assert document["error"]["retryable"] is error.is_retryable
    assert document["error"]["request_id"] == ID
    assert b"[DONE]" not in data


def test_each_dialect_finds_its_type_in_the_event():
    """Where its client looks for it."""
    openai, anthropic = (
        events(sse.error_event(NoWorker("none"), dialect, ID))[0][1]["error"]["type"] for dialect in Dialect
    )

    assert (openai, anthropic) == ("server_error", "overloaded_error")


@pytest.mark.parametrize("dialect", Dialect)
async def test_a_stream_that_fails_after_its_first_byte_ends_with_the_error(dialect):
    """The status stays 200, what was said stays said, and there is no [DONE]."""
    wire = Wire(dialect)
    await wire.reply.write(STREAM, b'data: {"t": 1}\n\n')
    await wire.reply.fail(WorkerLost("gone"))

    assert wire.status == 200
    assert wire.is_complete
    assert wire.body.startswith(b'data: {"t": 1}\n\n')
    assert [name for name, _ in events(wire.body)] == ["", "error"]
    assert b"[DONE]" not in wire.body


async def test_a_stream_that_fails_before_its_first_byte_is_a_plain_error():
    """A head alone is not yet a response."""
    wire = Wire()
    await wire.reply.fail(WorkerLost("gone"))

    assert wire.status == 503
    assert wire.is_complete
    assert json.loads(wire.body)["error"]["code"] == "worker_lost"
    assert dict(wire.headers)[b"content-length"] == str(len(wire.body)).encode()


async def test_a_whole_response_that_fails_is_a_plain_error_too():
    """What came of it is dropped: half a JSON document helps nobody."""
    wire = Wire()
    await wire.reply.write(WHOLE, b'{"half": ')
    await wire.reply.fail(WorkerLost("gone"))

    assert wire.status == 503
    assert b"half" not in wire.body


async def test_a_whole_response_is_sent_as_one_piece():
    """With its own length, and without the headers of the connection it came on."""
    wire = Wire()
    await wire.reply.write(WHOLE, b'{"a": ')
    await wire.reply.write(WHOLE, b"1}")
    await wire.reply.finish(WHOLE)

    assert wire.body == b'{"a": 1}'
    assert sorted(wire.headers) == [
        (b"content-length", b"8"),
        (b"content-type", b"application/json"),
        (b"x-request-id", ID.encode()),
    ]


async def test_a_stream_keeps_its_bytes_and_its_headers():
    """Byte for byte; our request id, not the worker's; and no cache or proxy holds it up."""
    wire = Wire()
    for data in (b"data: 1\n", b"\ndata: [DO", b"NE]\n\n"):
        await wire.reply.write(STREAM, data)
    await wire.reply.finish(STREAM)

    assert wire.body == b"data: 1\n\ndata: [DONE]\n\n"
    assert wire.is_complete
    assert [value for name, value in wire.headers if name == b"x-request-id"] == [ID.encode()]
    assert (b"cache-control", b"no-cache") in wire.headers


@pytest.mark.parametrize("head", [None, STREAM])
async def test_an_end_without_an_answer_is_an_error(head):
    """Never an empty 200."""
    wire = Wire()
    with pytest.raises(Internal):
        await wire.reply.finish(head)

    assert not wire.messages


async def test_a_refusal_of_the_application_is_passed_on_in_the_shape_of_ours():
    """What it says is the client's business."""
    wire = Wire()
    said = b'{"error": {"message": "no such thing", "param": "model"}}'
    await wire.reply.answer(HttpAnswer(HttpHead(422, (("content-type", "application/json"),)), said))

    error = json.loads(wire.body)["error"]
    assert (wire.status, error["message"], error["param"]) == (422, "no such thing", "model")


async def test_a_failure_after_a_complete_answer_changes_nothing():
    """The client has what it asked for; a second end would break the connection."""
    wire = Wire()
    await wire.reply.answer(HttpAnswer(WHOLE, b"{}"))
    await wire.reply.fail(Internal("internal error"))

    assert wire.body == b"{}"
