"""What one request may ask for: its price is known before anything is allocated."""

from __future__ import annotations

import pytest

from inferflux.errors import InvalidRequest
from services.gateway.bounds import MAX_INPUTS, MAX_LOGIT_BIASES, MAX_STOPS, Price, price


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({}, Price(1, None)),
        ({"n": None, "best_of": None, "max_tokens": None, "prompt": []}, Price(1, None)),
        ({"n": 4, "max_tokens": 100}, Price(4, 100)),
        ({"n": 2, "best_of": 5, "max_completion_tokens": 7}, Price(5, 7)),
        ({"prompt": "text", "n": 3}, Price(3, None)),
        ({"prompt": [1, 2, 3]}, Price(1, None)),
        ({"prompt": ["a", "b"], "n": 3}, Price(6, None)),
        ({"prompt": [[1], [2]], "max_output_tokens": 0}, Price(2, 0)),
        ({"n": 8}, Price(8, None)),
    ],
)
def test_the_price_is_sequences_and_tokens(document, expected):
    """Each choice of each prompt is a sequence; the limit itself is allowed."""
    assert price(document, 8) == expected


@pytest.mark.parametrize(
    ("document", "param"),
    [
        ({"n": 10**9}, "n"),
        ({"n": 0}, "n"),
        ({"n": -1}, "n"),
        ({"n": "3"}, "n"),
        ({"n": 2.0}, "n"),
        ({"n": True}, "n"),
        ({"n": [1]}, "n"),
        ({"best_of": 9}, "best_of"),
        ({"best_of": "1000000000"}, "best_of"),
        ({"prompt": ["x"] * 9}, None),
        ({"prompt": ["x"] * 3, "n": 3}, None),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"max_output_tokens": 10**18}, "max_output_tokens"),
        ({"min_tokens": 10**10}, "min_tokens"),
        ({"logit_bias": {str(i): 1 for i in range(MAX_LOGIT_BIASES + 1)}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"\u0661": 1}}, "logit_bias"),
        ({"logit_bias": {"99999999999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 100.5}}, "logit_bias"),
        ({"logit_bias": {"1": "1"}}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"stop": ["x"] * (MAX_STOPS + 1)}, "stop"),
    ],
)
def test_too_much_and_what_would_be_converted_is_refused(document, param):
    """The error names the field; a number in a string is another price than the one that was checked."""
    with pytest.raises(InvalidRequest) as raised:
        price(document, 8)

    assert raised.value.param == param


def test_the_limits_of_biases_and_stops_are_allowed():
    """Up to and including them."""
    biases = {str(i): (-100, 100, 0.5)[i % 3] for i in range(MAX_LOGIT_BIASES)}

    assert price({"logit_bias": biases, "stop": ["x"] * MAX_STOPS}, 1) == Price()


@pytest.mark.parametrize("name", ["input", "texts", "documents", "text_2", "queries"])
def test_texts_to_pool_are_counted(name):
    """The limit itself is allowed; one prompt of many tokens is one text, and so is a conversation."""
    price({name: ["a"] * MAX_INPUTS}, 8)
    price({name: [1] * (MAX_INPUTS + 1)}, 8)
    price({"input": [{"role": "user", "content": "a"}] * (MAX_INPUTS + 1)}, 8)
    for text in ("a", [1]):
        with pytest.raises(InvalidRequest, match=f"{name} has {MAX_INPUTS + 1} elements") as caught:
            price({name: [text] * (MAX_INPUTS + 1)}, 8)
        assert caught.value.param == name
