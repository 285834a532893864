"""Errors in the words of each dialect, and nothing in them that clients should not see."""

from __future__ import annotations

import json

import pytest

from inferflux import errors
from inferflux.errors import InferfluxError, LimitExceeded
from inferflux.types import HttpAnswer, HttpHead
from services.gateway import failures
from services.gateway.endpoints import Dialect

ID = "req_1"


def every_error(base: type[InferfluxError] = InferfluxError) -> list[type[InferfluxError]]:
    return [
        base,
        *(
            kind
            for child in base.__subclasses__()
            for kind in every_error(child)
            if child is not failures.MethodNotAllowed
        ),
    ]


ERRORS = every_error()
OPENAI = {
    errors.InvalidRequest: "invalid_request_error",
    errors.BodyTooLarge: "invalid_request_error",
    errors.Unauthenticated: "authentication_error",
    errors.PermissionDenied: "permission_error",
    errors.NotFound: "invalid_request_error",
    errors.Unavailable: "server_error",
    errors.DeadlineExceeded: "server_error",
    errors.Internal: "server_error",
}
ANTHROPIC = {
    errors.InvalidRequest: "invalid_request_error",
    errors.BodyTooLarge: "request_too_large",
    errors.Unauthenticated: "authentication_error",
    errors.PermissionDenied: "permission_error",
    errors.NotFound: "not_found_error",
    errors.ModelNotFound: "not_found_error",
    errors.NoWorker: "overloaded_error",
    errors.DeadlineExceeded: "timeout_error",
    errors.Internal: "api_error",
}


@pytest.mark.parametrize(("kind", "name"), OPENAI.items())
def test_openai_types(kind, name):
    """As the OpenAI client maps them; `code` is our reason."""
    document = json.loads(failures.body(kind("no", param="p"), Dialect.OPENAI, ID))

    assert document == {"error": {"message": "no", "type": name, "param": "p", "code": kind.reason.lower()}}


@pytest.mark.parametrize(("kind", "name"), ANTHROPIC.items())
def test_anthropic_types(kind, name):
    """As the Anthropic client maps them."""
    document = json.loads(failures.body(kind("no"), Dialect.ANTHROPIC, ID))

    assert document == {"type": "error", "error": {"type": name, "message": "no"}, "request_id": ID}


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("dialect", Dialect)
def test_every_error_has_a_body_in_every_dialect(kind, dialect):
    """With a message and a type that is not empty."""
    document = json.loads(failures.body(kind("it failed"), dialect, ID))

    assert document["error"]["message"] == "it failed"
    assert document["error"]["type"]


@pytest.mark.parametrize("kind", ERRORS)
def test_who_may_come_back_is_told_when(kind):
    """A retryable error has retry-after in whole seconds, and so has each limit: it ends some time."""
    headers = dict(failures.headers(kind("no")))

    assert (b"retry-after" in headers) == (kind.is_retryable or issubclass(kind, LimitExceeded))
    assert headers.get(b"retry-after", b"1").isdigit()


@pytest.mark.parametrize("after_s", [0.2, 1, 1.5, 30])
def test_retry_after_is_never_too_early_and_not_the_same_for_all(after_s):
    """Never zero either."""
    error = errors.Unavailable("no", retry_after_s=after_s)
    told = {int(dict(failures.headers(error))[b"retry-after"]) for _ in range(200)}

    assert all(max(1, after_s) <= seconds <= failures.MAX_SPREAD * after_s + 1 for seconds in told)
    assert after_s < 1 or len(told) > 1


def test_401_says_how_to_authenticate_and_405_says_what_is_allowed():
    """As HTTP wants it."""
    assert (b"www-authenticate", b"Bearer") in failures.headers(errors.Unauthenticated("no"))
    assert (b"allow", b"POST") in failures.headers(failures.MethodNotAllowed("POST"))
    assert failures.MethodNotAllowed("POST").http_status == 405


@pytest.mark.parametrize("error", [ValueError("a secret"), KeyError("a secret"), OSError(2, "a secret")])
def test_foreign_errors_keep_their_text_to_themselves(error):
    """It may hold anything."""
    shown = failures.shown(error)

    assert shown.http_status == 500
    assert b"secret" not in failures.body(shown, Dialect.OPENAI, ID)


def test_our_errors_are_shown_as_they_are():
    """Their messages are written to be shown."""
    error = errors.NoWorker("nobody")

    assert failures.shown(error) is error


def test_messages_are_escaped():
    """A message may quote what a client sent."""
    error = errors.NotFound('there is nothing at "\n\r\u2028</script>')

    assert json.loads(failures.body(error, Dialect.OPENAI, ID))["error"]["message"] == error.message


APPLICATION = b'{"error":{"message":"Grammar error: no","type":"BadRequestError","param":"tools","code":400}}'


def test_an_error_of_the_application_gets_the_shape_of_all_errors() -> None:
    """OpenAI's clients expect a code that is a string, and types that they know."""
    head = HttpHead(400, (("content-type", "application/json"), ("x-more", "1")))
    answer = failures.translated(HttpAnswer(head, APPLICATION), Dialect.OPENAI, ID)

    assert json.loads(answer.body) == {
        "error": {
            "message": "Grammar error: no",
            "type": "invalid_request_error",
            "param": "tools",
            "code": "invalid_request",
        }
    }
    assert sorted(answer.head.headers) == [("content-type", "application/json"), ("x-more", "1")]


def test_an_error_of_the_application_in_anthropics_shape() -> None:
    answer = failures.translated(HttpAnswer(HttpHead(404), APPLICATION), Dialect.ANTHROPIC, ID)

    told = {"type": "not_found_error", "message": "Grammar error: no"}
    assert json.loads(answer.body) == {"type": "error", "error": told, "request_id": ID}


@pytest.mark.parametrize("body", [b"", b"[]", b"<html>", b'{"error": "x"}', b'{"error": {"message": 3}}'])
def test_an_error_that_says_nothing_still_says_its_status(body: bytes) -> None:
    answer = failures.translated(HttpAnswer(HttpHead(400), body), Dialect.OPENAI, ID)

    assert json.loads(answer.body)["error"]["message"]


def test_what_went_wrong_inside_the_application_is_not_told() -> None:
    body = b'{"error": {"message": "KeyError: secret"}}'

    assert b"secret" not in failures.translated(HttpAnswer(HttpHead(500), body), Dialect.OPENAI, ID).body


@pytest.mark.parametrize("lead", [b"data: ", b"id: 0\ndata: ", b"id: 0\nevent: error\ndata: "])
def test_an_event_stream_that_begins_with_an_error_is_an_error(lead: bytes) -> None:
    told = APPLICATION if b"event" not in lead else b'{"type":"error","error":{"type":"x","message":"no"}}'
    answer = failures.refusal(lead + told + b"\n\nid: 1\ndata: [DONE]\n\n")

    assert answer is not None
    assert (answer.head.status, answer.body) == (400, told)


@pytest.mark.parametrize("data", [b"", b'data: {"id":"x"}\n\n', b'data: {"choices":[{"error":{}}]}\n\n', b": ping\n\n"])
def test_other_event_streams_are_left_alone(data: bytes) -> None:
    assert failures.refusal(data) is None
