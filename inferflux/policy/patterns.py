"""Regular expressions of guardrails: RE2, read here first, so that a stream can know when one may be matching.

`Pattern.partial` finds the place from which the end of an unfinished text may yet become a match. It is made of the
same syntax tree as `Pattern.full`, from which both are written anew: what Python's and RE2's grammar read differently
never gets through.
"""

from __future__ import annotations

import re
import re._constants as code  # type: ignore[import-not-found]
import re._parser as grammar  # type: ignore[import-not-found]  # the only reader of regular expressions that gives its tree away
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_PATTERN = 500
_NEVER = r"[^\x00-\x{10ffff}]"
_CATEGORIES = {
    code.CATEGORY_DIGIT: r"\d",
    code.CATEGORY_NOT_DIGIT: r"\D",
    code.CATEGORY_SPACE: r"\s",
    code.CATEGORY_NOT_SPACE: r"\S",
    code.CATEGORY_WORD: r"\w",
    code.CATEGORY_NOT_WORD: r"\W",
}
_PLACES = {
    code.AT_BEGINNING: "^",
    code.AT_BEGINNING_STRING: r"\A",
    code.AT_BOUNDARY: r"\b",
    code.AT_NON_BOUNDARY: r"\B",
    code.AT_END: "$",
}
_FLAGS = ((re.IGNORECASE, "i"), (re.MULTILINE, "m"), (re.DOTALL, "s"))
_KNOWN_FLAGS = re.IGNORECASE | re.MULTILINE | re.DOTALL | re.UNICODE
Nodes = Sequence[tuple[Any, Any]]


class PatternError(ValueError):
    """A pattern that can't be used; the text says why, without the pattern."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """`full` and `partial` are RE2 syntax. `max_chars`: of a match; None: without bound."""

    full: str
    partial: str
    max_chars: int | None


def read(pattern: str) -> Pattern:
    """Read a pattern in the syntax that Python and RE2 have in common. Raises PatternError."""
    if len(pattern) > MAX_PATTERN:
        raise PatternError(f"has {len(pattern)} characters, the limit is {MAX_PATTERN}")
    if "[[:" in pattern:
        raise PatternError("classes like [[:alpha:]] are not supported: use \\w, \\d, \\s or ranges")
    try:
        tree = grammar.parse(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        raise PatternError(f"is not a regular expression: {e}") from e
    least, most = tree.getwidth()
    if not least:
        raise PatternError("matches the empty text")
    flags = _flags(tree.state.flags)
    nodes: Nodes = list(tree)
    return Pattern(
        flags + _whole(nodes),
        f"{flags}(?:{_begun(nodes)})\\z",
        None if most >= code.MAXREPEAT else most,
    )


def _flags(flags: int) -> str:
    if flags & ~_KNOWN_FLAGS:
        raise PatternError("only the flags i, m and s are supported")
    letters = "".join(letter for flag, letter in _FLAGS if flags & flag)
    return f"(?{letters})" if letters else ""


def _whole(nodes: Nodes) -> str:
    return "".join(_node(kind, value) for kind, value in nodes)


def _node(kind: Any, value: Any) -> str:  # noqa: PLR0911 - one line for each kind of node
    if kind is code.LITERAL:
        return f"\\x{{{value:x}}}"
    if kind is code.NOT_LITERAL:
        return f"[^\\x{{{value:x}}}]"
    if kind is code.ANY:
        return "."
    if kind is code.IN:
        return _class(value)
    if kind is code.AT and value in _PLACES:
        return _PLACES[value]
    if kind is code.BRANCH:
        return f"(?:{'|'.join(_whole(list(branch)) for branch in value[1])})"
    if kind is code.SUBPATTERN:
        return f"{_group(value)}{_whole(list(value[3]))})"
    if kind in (code.MAX_REPEAT, code.MIN_REPEAT):
        lazy = "?" if kind is code.MIN_REPEAT else ""
        return f"(?:{_whole(list(value[2]))}){_times(value[0], value[1])}{lazy}"
    raise PatternError(f"uses {str(kind).lower()}, which RE2 does not have")


def _class(items: Nodes) -> str:
    parts = []
    for kind, value in items:
        if kind is code.NEGATE:
            parts.append("^")
        elif kind is code.LITERAL:
            parts.append(f"\\x{{{value:x}}}")
        elif kind is code.RANGE:
            parts.append(f"\\x{{{value[0]:x}}}-\\x{{{value[1]:x}}}")
        else:
            parts.append(_CATEGORIES[value])
    return f"[{''.join(parts)}]"


def _group(value: Any) -> str:
    """Open a group with the flags that it sets; no group captures."""
    _, added, removed, _ = value
    letters = "".join(letter for flag, letter in _FLAGS if added & flag)
    dropped = "".join(letter for flag, letter in _FLAGS if removed & flag)
    return f"(?{letters}{'-' + dropped if dropped else ''}:"


def _times(least: int, most: int) -> str:
    return f"{{{least},{'' if most is code.MAXREPEAT else most}}}"


def _begun(nodes: Nodes) -> str:
    """Match what a match may begin with: at least one character, at most all of it."""
    if not nodes:
        return _NEVER
    begun = _begun_node(*nodes[-1])
    for kind, value in reversed(nodes[:-1]):
        begun = f"(?:{_begun_node(kind, value)}|{_node(kind, value)}{begun})"
    return begun


def _begun_node(kind: Any, value: Any) -> str:
    if kind is code.AT:
        return _NEVER
    if kind is code.BRANCH:
        return f"(?:{'|'.join(_begun(list(branch)) for branch in value[1])})"
    if kind is code.SUBPATTERN:
        return f"{_group(value)}{_begun(list(value[3]))})"
    if kind in (code.MAX_REPEAT, code.MIN_REPEAT):
        _, most, item = value
        if not most:
            return _NEVER
        before = most if most is code.MAXREPEAT else most - 1
        return f"(?:{_whole(list(item))}){_times(0, before)}{_begun(list(item))}" if before else _begun(list(item))
    return _node(kind, value)
