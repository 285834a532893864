"""JSON objects that every reader understands alike, parsed at a bounded price.

Two readers of one body must not see two requests: a member that comes twice, or a number that one of them rounds and
another refuses, is where they differ. orjson refuses NaN, Infinity and bad UTF-8 by itself. What it would let through
is found in the skeleton of the body, which is the body without its strings; that is also where the price is seen,
before anything is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import orjson

from inferflux.errors import InvalidRequest

MAX_STRINGS = 1 << 17
MAX_MEMBERS = 1 << 16
MAX_VALUES = 1 << 21
MAX_DIGITS = 19
_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_LONG = b"0" * (MAX_DIGITS + 1)
_LONG_INTEGER = re.compile(rb"(?<![.0-9])[0-9]{%d}" % (MAX_DIGITS + 1))
Node = dict[str, Any] | list[Any]


def parse_object(body: bytes, max_depth: int) -> dict[str, Any]:
    """Parse a JSON object. Raises InvalidRequest."""
    skeleton = _skeleton(body)
    num_members = _count_members(skeleton)
    document = _loads(body)
    num_objects = skeleton.count(b"{")
    # One object without much nesting has been seen whole; its lists may be long.
    is_plain = num_objects == 1 and skeleton.count(b"[") < max_depth
    num_seen = len(document) if is_plain else _measure(document, max_depth)
    if num_seen != num_members:
        raise InvalidRequest("an object in the body has the same member more than once")
    return document


def _skeleton(body: bytes) -> bytes:
    """Remove all strings: every other piece between quotes, when those that are escaped are gone."""
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if (num_strings := plain.count(b'"') // 2) > MAX_STRINGS:
        raise InvalidRequest(f"the body has {num_strings} strings, the limit is {MAX_STRINGS}")
    return b"".join(plain.split(b'"')[::2])


def _count_members(skeleton: bytes) -> int:
    """Count what the body claims to have, and refuse what is not worth to be parsed."""
    num_members = skeleton.count(b":")
    if num_members > MAX_MEMBERS:
        raise InvalidRequest(f"the objects of the body have {num_members} members, the limit is {MAX_MEMBERS}")
    if (num_values := skeleton.count(b",")) > MAX_VALUES:
        raise InvalidRequest(f"the body has {num_values} values, the limit is {MAX_VALUES}")
    if _LONG in skeleton.translate(_ZEROS) and _LONG_INTEGER.search(skeleton):
        raise InvalidRequest(f"a number in the body has more than {MAX_DIGITS} digits before its point")
    return num_members


def _loads(body: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as e:
        raise InvalidRequest(f"the body is not valid JSON: {e.msg} at byte {e.pos}") from e
    if not isinstance(document, dict):
        raise InvalidRequest("the body must be a JSON object")
    return document


def _measure(document: dict[str, Any], max_depth: int) -> int:
    """Count the members of all objects. Raises InvalidRequest when they are nested too deeply."""
    num_members, level = 0, list[Node]([document])
    for _ in range(max_depth):
        num_members += sum(len(node) for node in level if isinstance(node, dict))
        level = [child for node in level for child in _children(node) if isinstance(child, (dict, list))]
        if not level:
            return num_members
    raise InvalidRequest(f"the body is nested deeper than {max_depth} levels")


def _children(node: Node) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node
