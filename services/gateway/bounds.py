"""How much one request may ask for, checked before anything is allocated for it.

Each choice of each prompt is a sequence in an engine. A type that the application would convert (a number in a string)
is refused here: otherwise the price that was checked would not be the price that is paid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inferflux.errors import InvalidRequest

MAX_TOKENS = (1 << 31) - 1
MAX_LOGIT_BIASES = 300
MAX_LOGIT_BIAS = 100
MAX_STOPS = 64
MAX_INPUTS = 2048
"""As in OpenAI's embeddings. Each is a prompt in an engine; scores have two sides."""
_LENGTHS = ("max_completion_tokens", "max_output_tokens", "max_tokens")
_COUNTS = ("n", "best_of")
_INPUTS = ("input", "texts", "inputs", "documents", "text_1", "text_2", "queries", "items", "data_1", "data_2")


@dataclass(frozen=True, slots=True)
class Price:
    """What a request asks for at most. `max_tokens` per sequence; None: as many as the model's context has room for."""

    num_sequences: int = 1
    max_tokens: int | None = None


def price(document: Mapping[str, Any], max_sequences: int) -> Price:
    """Say what a call asks for. Raises InvalidRequest for more than is allowed."""
    num_choices = max(_integer(document, name, 1, max_sequences) or 1 for name in _COUNTS)
    num_sequences = num_choices * _num_prompts(document.get("prompt"))
    if num_sequences > max_sequences:
        raise InvalidRequest(f"prompts times choices are {num_sequences} sequences, the limit is {max_sequences}")
    lengths = [length for name in _LENGTHS if (length := _integer(document, name, 0, MAX_TOKENS)) is not None]
    _integer(document, "min_tokens", 0, MAX_TOKENS)
    _check_inputs(document)
    _check_logit_bias(document.get("logit_bias"))
    _check_stop(document.get("stop"))
    return Price(num_sequences, lengths[0] if lengths else None)


def _integer(document: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = document.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InvalidRequest(f"{name} must be an integer from {least} to {most}", param=name)
    return value


def _num_prompts(prompt: object) -> int:
    """A list of numbers is one prompt, any other list one per element."""
    if not isinstance(prompt, list) or not prompt or isinstance(prompt[0], int):
        return 1
    return len(prompt)


def _check_inputs(document: Mapping[str, Any]) -> None:
    """Bound the texts to embed or score; a list of numbers is one of them, and so is a conversation."""
    for name in _INPUTS:
        value = document.get(name)
        is_conversation = name == "input" and isinstance(value, list) and bool(value) and isinstance(value[0], dict)
        if not is_conversation and (num_inputs := _num_prompts(value)) > MAX_INPUTS:
            raise InvalidRequest(f"{name} has {num_inputs} elements, the limit is {MAX_INPUTS}", param=name)


def _check_logit_bias(biases: object) -> None:
    if biases is None:
        return
    if not isinstance(biases, dict) or len(biases) > MAX_LOGIT_BIASES:
        raise InvalidRequest(f"logit_bias must be an object of at most {MAX_LOGIT_BIASES} tokens", param="logit_bias")
    for token, bias in biases.items():
        is_number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
        if not (token.isascii() and token.isdecimal() and int(token) <= MAX_TOKENS):
            raise InvalidRequest("logit_bias must name tokens by their ids", param="logit_bias")
        if not is_number or abs(bias) > MAX_LOGIT_BIAS:
            limit = f"from -{MAX_LOGIT_BIAS} to {MAX_LOGIT_BIAS}"
            raise InvalidRequest(f"each bias in logit_bias must be a number {limit}", param="logit_bias")


def _check_stop(stop: object) -> None:
    if isinstance(stop, list) and len(stop) > MAX_STOPS:
        raise InvalidRequest(f"stop has {len(stop)} strings, the limit is {MAX_STOPS}", param="stop")
