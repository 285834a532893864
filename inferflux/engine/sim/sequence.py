"""What is being generated: jobs of one prompt each, and their choices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from inferflux.engine.base import KvSource
from inferflux.engine.sim import tokenizer
from inferflux.types import KvReport

GREEDY = b""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a call wants its tokens. `max_tokens` None: until the engine's natural end."""

    max_tokens: int | None = None
    n: int = 1
    temperature: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def key(self, choice: int) -> bytes:
        """What tells this choice's tokens from those of other seeds and choices; greedy ones are all alike."""
        return GREEDY if self.temperature == 0 else f"{self.seed}/{choice}".encode()


@dataclass(frozen=True, slots=True)
class Emitted:
    """Tokens of a choice whose text is settled; `finish_reason` comes with the last. `stop`: the string that hit."""

    choice: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str = ""
    stop: str | None = None


Event = Emitted | KvReport | Exception


class StopGuard:
    """Holds tokens back as long as their text may be the beginning of a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held: list[int] = []

    def push(self, token_id: int) -> tuple[tuple[int, ...], str, str | None]:
        """Add a token; return what is settled: ids, their text, and the stop string that hit (cut from the text)."""
        if not self._stop:
            return (token_id,), tokenizer.decode((token_id,)), None
        self._held.append(token_id)
        text = tokenizer.decode(self._held)
        hits = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if hits:
            at, stop = min(hits)
            return self.flush()[0], text[:at], stop
        num = next((i for i in range(len(self._held)) if self._may_begin(i)), len(self._held))
        settled, self._held = tuple(self._held[:num]), self._held[num:]
        return settled, tokenizer.decode(settled), None

    @property
    def is_holding(self) -> bool:
        return bool(self._held)

    def flush(self) -> tuple[tuple[int, ...], str]:
        """Everything held back."""
        held, self._held = tuple(self._held), []
        return held, tokenizer.decode(held)

    def _may_begin(self, i: int) -> bool:
        """Whether a stop string may begin in the text of held token `i`."""
        text = tokenizer.decode(self._held[i:])
        starts = range(len(tokenizer.decode(self._held[i : i + 1])))
        return any(stop.startswith(text[start:]) for start in starts for stop in self._stop)


@dataclass(slots=True, eq=False)
class Choice:
    """One continuation of a prompt. `tokens`: prompt and output; `num_computed` of them have their KV in `blocks`."""

    index: int
    sampling_key: bytes
    guard: StopGuard
    tokens: list[int]
    num_output: int = 0
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    finish_reason: str = ""

    def add(self, token_id: int, finish_reason: str) -> Emitted | None:
        """Append a sampled token and return what of the output is settled now, if anything."""
        self.tokens.append(token_id)
        self.num_output += 1
        token_ids, text, stop = self.guard.push(token_id)
        if finish_reason and stop is None and self.guard.is_holding:
            held_ids, held_text = self.guard.flush()
            token_ids, text = token_ids + held_ids, text + held_text
        self.finish_reason = "stop" if stop is not None else finish_reason
        if not token_ids and not self.finish_reason:
            return None
        return Emitted(self.index, token_ids, text, self.finish_reason, stop)


@dataclass(slots=True, eq=False)
class Job:
    """One prompt on its way through the scheduler, which fills everything from `num_cached` on.

    `source` may cover a part of the prompt; `num_read` tokens came from there, unless `has_failed_read`.
    `limit`: output tokens per choice. `natural_end`: the output token that ends a choice by itself; None: none does.
    `publish` copies the prompt's blocks out, right after they are computed. `early`: a first token that was emitted
    before the KV it follows from was here.
    """

    prompt: tuple[int, ...]
    hashes: list[bytes]
    choices: list[Choice]
    limit: int
    emit: Callable[[Event], None]
    natural_end: int | None = None
    may_stop: bool = False
    priority: int = 0
    source: KvSource | None = None
    publish: Callable[[Sequence[int], int], None] | None = None
    num_cached: int = 0
    num_read: int = 0
    has_failed_read: bool = False
    is_computed: bool = False
    digest: bytes = b""
    early: int | None = None

    @property
    def is_finished(self) -> bool:
        return all(choice.finish_reason for choice in self.choices)

    @property
    def num_uncomputed(self) -> int:
        """Prompt tokens whose KV is missing here."""
        return 0 if self.is_computed else len(self.prompt) - self.choices[0].num_computed

    @property
    def early_token(self) -> int | None:
        """The token that prefill sampled, if it can be used before its KV is here: it must not end the request."""
        is_simple = len(self.choices) == 1 and self.choices[0].num_output == 0 and not self.may_stop
        if self.source is None or not is_simple or self.limit <= 1:
            return None
        return self.source.first_token_ids[0] if len(self.source.first_token_ids) == 1 else None

    def add(self, choice: Choice, token_id: int) -> None:
        """Append a token, sampled here or elsewhere, to a choice, end it where it must end, and tell the reader."""
        num_output = choice.num_output + 1
        finish_reason = "length" if num_output >= self.limit else ""
        if self.natural_end is not None and num_output >= self.natural_end:
            token_id, finish_reason = tokenizer.END_OF_TEXT, "stop"
        if (emitted := choice.add(token_id, finish_reason)) is not None:
            self.emit(emitted)
