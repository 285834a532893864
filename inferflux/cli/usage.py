"""`inferctl admin usage`: what keys, teams and tenants have used of their limits, over HTTP."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from inferflux.cli.api import Api
from inferflux.cli.output import Format, print_json, print_table

PATH = "/v1/admin/usage"
COLUMNS = ("scope", "owner", "limit", "used", "of", "resets in")
Document = dict[str, Any]


def show(tenant: str | None, output: Format) -> None:
    """List counters."""
    with Api() as api:
        document: Document = api.get(f"{PATH}?tenant={quote(tenant, safe='')}" if tenant else PATH)
    if output is Format.JSON:
        print_json(document)
        return
    print_table(COLUMNS, map(row, document["data"]))


def row(usage: Document) -> tuple[Any, ...]:
    """Render a counter for people."""
    most = "-" if usage["limit"] is None else usage["limit"]
    return usage["scope"], usage["owner"], usage["kind"], usage["used"], most, span(usage["reset_s"])


def span(seconds: float) -> str:
    """Render a time in its two largest units."""
    for size, unit, smaller, name in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size // smaller)} {name}"
    return f"{seconds:.0f} s"
