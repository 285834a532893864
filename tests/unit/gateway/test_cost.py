"""What a request is taken to cost, and what it did cost, whichever way it ended."""

from __future__ import annotations

import asyncio

import pytest

from inferflux.errors import DeadlineExceeded, Internal, InvalidRequest
from inferflux.policy.limits import LimitsSection, Unit, compile_limits
from inferflux.types import Usage
from inferflux.v1 import types_pb2
from services.gateway import cost
from services.gateway.auth import Principal
from services.gateway.bounds import Price
from services.gateway.call import Call, Phase
from services.gateway.cost import Cost
from services.gateway.endpoints import ENDPOINTS

PRICES = {
    "prices": {
        "m": {"input": 1.0, "output": 2.0},
        "big*": {"input": 5.0, "output": 5.0},
        "*": {"input": 0.5, "output": 0.5},
    }
}
LIMITS = compile_limits(LimitsSection.model_validate({"assumed_output_tokens": 50, "budgets": PRICES}))
GUESSED = Cost(1, 10, 100)


def call(path="/v1/chat/completions", body=b"x" * 40, **fields):
    http = types_pb2.HttpCall(path=path, body=body)
    principal = Principal("key_1", "t", frozenset())
    return Call("req_1", ENDPOINTS[path], principal, "m", http, received_at=0.0, deadline_at=1.0, **fields)


def delivered(number, **fields):
    made = call(**fields)
    made.journal.take(0, [1] * number)
    return made


@pytest.mark.parametrize(
    ("price", "expected"),
    [
        (Price(1, 100), Cost(1, 10, 100)),
        (Price(3, 100), Cost(1, 10, 300)),
        (Price(2, None), Cost(1, 10, 100)),
        (Price(1, 0), Cost(1, 10, 0)),
    ],
)
def test_a_request_is_taken_to_be_as_long_as_it_may_be(price, expected):
    """For each of its sequences; without a maximum, as long as the policy assumes."""
    assert cost.guess(call(), price, LIMITS) == expected


def test_what_generates_nothing_has_no_response_to_count():
    """Embeddings are prompts only."""
    assert cost.guess(call("/v1/embeddings"), Price(1, 100), LIMITS) == Cost(1, 10)


def test_a_request_that_goes_on_has_been_counted_before():
    """It only takes a place among those that run."""
    guessed = cost.guess(call(is_recalled=True), Price(), LIMITS)

    assert guessed == Cost()
    assert guessed.amount(Unit.SLOTS, LIMITS, "m") == 1


def test_a_whole_answer_costs_what_its_worker_says():
    """Whatever was guessed."""
    done = call(usage=Usage(7, 9))

    assert cost.known(done, GUESSED, 0, None, was_heard=True) == Cost(1, 7, 9)


def test_a_request_that_the_application_refuses_is_a_request():
    """Without tokens."""
    assert cost.known(call(), GUESSED, 0, None, was_heard=True) == Cost(1)


def test_a_failure_of_ours_is_free_until_something_was_heard():
    """Then the client has what it has."""
    broken = delivered(5, phase=Phase.DECODE, num_prompt_tokens=8)

    assert cost.known(broken, GUESSED, 0, Internal("x"), was_heard=False) == Cost()
    assert cost.known(broken, GUESSED, 0, Internal("x"), was_heard=True) == Cost(1, 8, 5)


@pytest.mark.parametrize("error", [InvalidRequest("x"), DeadlineExceeded("x")])
def test_what_a_client_brought_about_is_not_free(error):
    """A deadline that can't be met, or a request that is refused for what it makes the model say."""
    broken = delivered(5, phase=Phase.DECODE, num_prompt_tokens=8)

    assert cost.known(broken, GUESSED, 0, error, was_heard=False) == Cost(1, 8, 5)


def test_who_leaves_pays_for_what_was_computed():
    """Nothing before a worker has it, then its prompt, then each token."""
    gone = asyncio.CancelledError()

    assert cost.known(call(), GUESSED, 0, gone, was_heard=False) == Cost(1)
    assert cost.known(call(phase=Phase.PREFILL), GUESSED, 0, gone, was_heard=False) == Cost(1, 10)
    known = delivered(5, phase=Phase.DECODE, num_prompt_tokens=8)
    assert cost.known(known, GUESSED, 0, gone, was_heard=True) == Cost(1, 8, 5)


def test_the_rest_of_a_stream_costs_what_the_first_part_did_not():
    """Neither its prompt nor its first tokens again."""
    done = delivered(30, is_recalled=True, usage=Usage(7, 30))
    gone = delivered(25, is_recalled=True, phase=Phase.DECODE)

    assert cost.known(done, Cost(), 20, None, was_heard=True) == Cost(0, 0, 10)
    assert cost.known(gone, Cost(), 20, asyncio.CancelledError(), was_heard=True) == Cost(0, 0, 5)


@pytest.mark.parametrize(("model", "expected"), [("m", 7 + 18), ("bigger", 80), ("other", 8)])
def test_tokens_cost_what_the_longest_name_that_fits_says(model, expected):
    """In millionths of a dollar."""
    assert Cost(1, 7, 9).amount(Unit.MICRO_USD, LIMITS, model) == expected
