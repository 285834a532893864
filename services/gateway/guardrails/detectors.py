"""What finds matches in a text, and knows where at the end of an unfinished text a match may have begun.

Compiled once per revision of the policy and shared by all requests. A text is given with the position from which it has
not been judged; at least one character before that is there, if there is one, for word boundaries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import ahocorasick
import re2

from inferflux.policy import patterns
from inferflux.policy.guardrails import BlocklistRule, Rule
from services.gateway.guardrails.forms import Check


class Match(NamedTuple):
    """What a rule found at [start, end). `label` may be shown; the text may not."""

    start: int
    end: int
    rule: Rule
    label: str


class Pending(NamedTuple):
    """Where a match of a rule may have begun that the end of the text cuts off."""

    start: int
    rule: Rule


class Detector(Protocol):
    """`matches` are all that end in the text. `pending`: None if nothing at its end can become a match."""

    def matches(self, text: str, begin: int) -> Iterator[Match]: ...

    def pending(self, text: str, begin: int) -> Pending | None: ...


@dataclass(frozen=True, slots=True)
class Expression:
    """A pattern of a rule, in RE2's syntax."""

    pattern: patterns.Pattern
    rule: Rule
    label: str
    check: Check = len


class Expressions:
    """Many patterns at once: two RE2 sets say which of them are worth a search."""

    def __init__(self, expressions: Sequence[Expression]) -> None:
        self._expressions = expressions
        self._full = [_compiled(e.pattern.full) for e in expressions]
        self._partial = [_compiled(e.pattern.partial) for e in expressions]
        self._full_set = PatternSet([e.pattern.full for e in expressions])
        self._partial_set = PatternSet([e.pattern.partial for e in expressions])

    def matches(self, text: str, begin: int) -> Iterator[Match]:
        for i in self._full_set.found_in(text):
            yield from self._matches_of(i, text, begin)

    def _matches_of(self, i: int, text: str, begin: int) -> Iterator[Match]:
        search, expression = self._full[i].search, self._expressions[i]
        while (found := search(text, begin)) is not None:
            start, end = found.span()
            if size := expression.check(text[start:end]):
                yield Match(start, start + size, expression.rule, expression.label)
            begin = start + (size or 1)

    def pending(self, text: str, begin: int) -> Pending | None:
        begun = [
            Pending(found.start(), self._expressions[i].rule)
            for i in self._partial_set.found_in(text)
            if (found := self._partial[i].search(text, begin)) is not None
        ]
        return min(begun, key=lambda p: p.start, default=None)


class PatternSet:
    """Tells in one pass which of many patterns are found in a text.

    RE2 does not tell "none of them" from "out of memory"; one more pattern, which is in every text, does.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self._num = len(sources)
        self._set: Any = re2.Set.SearchSet(_options())
        for source in (*sources, ""):
            self._set.Add(source)
        self._set.Compile()

    def found_in(self, text: str) -> Sequence[int]:
        """Return the numbers of the patterns; all of them if RE2 can't tell."""
        found = self._set.Match(text)
        return [i for i in found if i < self._num] if found else range(self._num)


class Phrases:
    """The phrases of all blocklists that are alike in their treatment of case."""

    def __init__(self, rules: Sequence[BlocklistRule]) -> None:
        self._is_case_sensitive = rules[0].is_case_sensitive
        self._automaton: Any = ahocorasick.Automaton()
        for rule in rules:
            for phrase in rule.phrases:
                self._add(self._folded(phrase), rule)
        self._max_chars = max(len(self._folded(phrase)) for rule in rules for phrase in rule.phrases)
        self._automaton.make_automaton()

    def _add(self, phrase: str, rule: BlocklistRule) -> None:
        known: list[BlocklistRule] = self._automaton.get(phrase, (phrase, []))[1]
        self._automaton.add_word(phrase, (phrase, [*known, rule]))

    def matches(self, text: str, begin: int) -> Iterator[Match]:
        folded = self._folded(text)
        for last, (phrase, rules) in self._automaton.iter(folded):
            end = last + 1
            start = end - len(phrase)
            if start >= begin:
                is_whole = not (_is_inside_word(text, start) or _is_inside_word(text, end))
                for rule in rules:
                    if is_whole or not rule.is_whole_words:
                        yield Match(start, end, rule, "REDACTED")

    def pending(self, text: str, begin: int) -> Pending | None:
        folded, size = self._folded(text), len(text)
        for start in range(max(begin, size - self._max_chars), size):
            if self._automaton.longest_prefix(folded[start:]) == size - start:
                _, rules = next(self._automaton.values(folded[start:]))
                return Pending(start, rules[0])
        return None

    def _folded(self, text: str) -> str:
        """Lower case, character by character: positions stay what they are."""
        if self._is_case_sensitive:
            return text
        lower = text.lower()
        return lower if len(lower) == len(text) else "".join(c if len(c.lower()) > 1 else c.lower() for c in text)


class Urls:
    """URLs of hosts that a rule is against; everything else about them is an expression's."""

    def __init__(self, allow: Sequence[str], deny: Sequence[str]) -> None:
        self._allow, self._deny = allow, deny

    def check(self, url: str) -> int:
        """Measure a URL; 0: the rule has nothing against it."""
        host = host_of(url)
        is_wrong = any(_is_in(host, name) for name in self._deny) or (
            bool(self._allow) and not any(_is_in(host, name) for name in self._allow)
        )
        return len(url) if is_wrong or not (self._allow or self._deny) else 0


def host_of(url: str) -> str:
    """Return the host that clients would connect to, in lower case."""
    authority = url.partition("://")[2] if "://" in url else url
    for mark in "/?#":
        authority = authority.partition(mark)[0]
    host = authority.rpartition("@")[2]
    return host.partition(":")[0].rstrip(".").lower()


def _is_in(host: str, name: str) -> bool:
    return host.endswith(name[1:]) if name.startswith("*.") else host == name


def _is_inside_word(text: str, place: int) -> bool:
    return 0 < place < len(text) and _is_word(text[place - 1]) and _is_word(text[place])


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


@lru_cache(maxsize=1024)
def _compiled(source: str) -> Any:
    return re2.compile(source, _options())


def _options() -> Any:
    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    options.max_mem = 64 << 20
    return options
