"""What a request costs: guessed before it runs, known when it is over.

Nobody has counted the tokens of a prompt before a worker does. Until then it is taken to have one token for four bytes
of the body: more than there are, for text in JSON; less, for scripts with long UTF-8. A response is taken to be as long
as it may be. What is booked in the end is what the worker says, or, when the request was broken off, what was computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from inferflux.errors import DeadlineExceeded, InferfluxError
from inferflux.policy.limits import Limits, Unit
from services.gateway.bounds import Price
from services.gateway.call import Call, Phase
from services.gateway.endpoints import Kind

BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one request. `requests`: 0 for one that has been counted before."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def amount(self, unit: Unit, limits: Limits, model: str) -> int:
        """Return what a limit of this unit counts; each request that runs has one slot."""
        match unit:
            case Unit.REQUESTS:
                return self.requests
            case Unit.TOKENS:
                return self.prompt_tokens + self.completion_tokens
            case Unit.MICRO_USD:
                return limits.micro_usd(model, self.prompt_tokens, self.completion_tokens)
            case Unit.SLOTS:
                return 1


def guess(call: Call, price: Price, limits: Limits) -> Cost:
    """Say what a request may cost. One that goes on with a stream has been counted when that began."""
    if call.is_recalled:
        return Cost()
    prompt_tokens = -(-len(call.http.body) // BYTES_PER_TOKEN)
    if call.endpoint.kind is not Kind.GENERATE:
        return Cost(1, prompt_tokens)
    per_sequence = price.max_tokens if price.max_tokens is not None else limits.section.assumed_output_tokens
    return Cost(1, prompt_tokens, price.num_sequences * per_sequence)


def known(call: Call, guessed: Cost, num_before: int, error: BaseException | None, *, was_heard: bool) -> Cost:
    """Say what a request did cost. `num_before`: tokens of its response that an earlier connection paid for.

    `was_heard`: its client has a part of the response. A failure of ours that nobody heard anything of is free; what
    a client brought about itself is not.
    """
    if error is None:
        cost = Cost(guessed.requests, call.usage.prompt_tokens, call.usage.completion_tokens)
    elif _is_ours(error) and not was_heard:
        return Cost()
    else:
        cost = Cost(guessed.requests, _computed_prompt(call, guessed), call.journal.num_tokens)
    if call.is_recalled:
        return Cost(0, 0, max(0, cost.completion_tokens - num_before))
    return cost


def _is_ours(error: BaseException) -> bool:
    """Whether it is our fault that a request did not end well. A deadline is a client's own choice."""
    return isinstance(error, InferfluxError) and error.http_status >= 500 and not isinstance(error, DeadlineExceeded)


def _computed_prompt(call: Call, guessed: Cost) -> int:
    """How many tokens of the prompt were computed: as a worker said, or else what was guessed if one has begun."""
    if call.phase is Phase.ROUTING:
        return 0
    return call.usage.prompt_tokens or call.num_prompt_tokens or guessed.prompt_tokens
