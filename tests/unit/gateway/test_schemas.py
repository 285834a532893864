"""Schemas that are too large or too deep, or that no worker would follow."""

from __future__ import annotations

import json
from typing import Any

import pytest

from inferflux.errors import InvalidRequest
from services.gateway import schemas


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


BRINGERS: dict[str, Any] = {
    "response_format": lambda schema: {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    "text": lambda schema: {"format": {"type": "json_schema", "name": "x", "schema": schema}},
    "output_config": lambda schema: {"format": {"type": "json_schema", "schema": schema}},
    "structured_outputs": lambda schema: {"json": schema},
}


@pytest.mark.parametrize("name", BRINGERS)
def test_depth_and_size_are_limited_wherever_a_schema_comes_from(name: str) -> None:
    """The error names the field, the limit and the actual value."""
    schemas.check({name: BRINGERS[name](nested(8))}, 1000, 8)
    with pytest.raises(InvalidRequest, match="at least 9 levels deep, the limit is 8") as deep:
        schemas.check({name: BRINGERS[name](nested(20))}, 1000, 8)
    with pytest.raises(InvalidRequest, match="at least 1014 bytes, the limit is 1000") as large:
        schemas.check({name: BRINGERS[name]({"const": "x" * 1002})}, 1000, 8)

    assert (deep.value.param, large.value.param) == (name, name)


def test_a_schema_in_a_string_counts_like_any_other() -> None:
    with pytest.raises(InvalidRequest, match="levels deep"):
        schemas.check({"structured_outputs": {"json": json.dumps(nested(20))}}, 1000, 8)
    schemas.check({"structured_outputs": {"json": "{ not JSON"}}, 1000, 8)


@pytest.mark.parametrize("field", ["regex", "grammar", "choice"])
def test_text_is_limited_in_size(field: str) -> None:
    spec = ["x" * 600, "y" * 600] if field == "choice" else "x" * 1200

    with pytest.raises(InvalidRequest, match="the limit is 1000"):
        schemas.check({"structured_outputs": {field: spec}}, 1000, 8)


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "function", "function": {"name": "f", "parameters": {"const": "x" * 600}}},
        {"type": "function", "name": "f", "parameters": {"const": "x" * 600}},
        {"name": "f", "input_schema": {"const": "x" * 600}},
    ],
)
def test_tools_are_limited_together(tool: dict[str, Any]) -> None:
    schemas.check({"tools": [tool]}, 1000, 8)
    with pytest.raises(InvalidRequest, match="the limit is 1000"):
        schemas.check({"tools": [tool, tool]}, 1000, 8)


def test_there_are_so_many_tools_at_most() -> None:
    with pytest.raises(InvalidRequest, match="129 tools, the limit is 128"):
        schemas.check({"tools": [{}] * 129}, 1000, 8)


@pytest.mark.parametrize(
    "body",
    [
        {"guided_json": {}},
        {"guided_regex": "a"},
        {"structural_tag": "{}"},
        {"response_format": {"type": "structural_tag", "structures": [], "triggers": []}},
        {"structured_outputs": {"structural_tag": "{}"}},
    ],
)
def test_what_would_be_ignored_or_can_not_be_checked_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="not offered"):
        schemas.check(body, 1000, 8)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"tools": None, "response_format": None, "text": None, "structured_outputs": None, "output_config": None},
        {"tools": "x", "response_format": 1, "text": [], "structured_outputs": "x", "output_config": "x"},
        {"tools": [1, None, {"function": 3}], "response_format": {"json_schema": 1}, "text": {"format": None}},
    ],
)
def test_what_is_malformed_is_left_to_the_application(body: dict[str, Any]) -> None:
    schemas.check(body, 1000, 8)
