"""`inferctl tickets`: which tickets there are, and whether they add up."""

from __future__ import annotations

from typing import Any

from inferflux.cli.api import Api
from inferflux.cli.failure import CliError
from inferflux.cli.output import Format, note, print_json, print_table

PATH = "/v1/admin/tickets"
MAX_TICKETS = 1000
COLUMNS = ("id", "worker", "state", "age", "bytes", "claimant", "request", "tenant")


def show(output: Format, *, live: bool, leaked: bool) -> None:
    """Print tickets and the balance. Raises CliError when they don't add up, or for leaked ones that were asked for."""
    query = "&".join(["leaked=true"] * leaked + ["live=true"] * live + [f"limit={MAX_TICKETS}"])
    with Api() as api:
        document = api.get(f"{PATH}?{query}")
    if output is Format.JSON:
        print_json(document)
    else:
        print_table(COLUMNS, (row(ticket) for ticket in document["data"]))
        for line in (*map(balance, document["workers"]), balance(document["total"] | {"id": "total"})):
            note(line)
    require_proof(document, leaked=leaked)


def row(ticket: dict[str, Any]) -> tuple[object, ...]:
    """Render one ticket for people."""
    state = f"{ticket['state']} (leaked)" if ticket["leaked"] else ticket["state"]
    t, age = ticket, f"{ticket['age_s']:.1f} s"
    return t["id"], t["worker"], state, age, t["bytes"], t["claimant"], t["request_id"], t["tenant"]


def balance(c: dict[str, Any]) -> str:
    """Render what one worker's tickets, or all of them, add up to."""
    if "error" in c:
        return f"{c['id']}: {c['error']}"
    ends = f"{c['released']} released + {c['expired']} expired + {c['revoked']} revoked + {c['live']} live"
    leaks = f"{c['leaked']} leaked, {c['leaked_slots']} leaked slots"
    return f"{c['id']}: {c['issued']} issued = {ends}; {leaks}"


def require_proof(document: dict[str, Any], *, leaked: bool) -> None:
    """Raise CliError unless the tickets add up, and none has leaked if that was the question."""
    if not document["balanced"]:
        raise CliError("the tickets do not add up, or not every prefill worker answers")
    total = document["total"]
    if leaked and total["leaked"] + total["leaked_slots"]:
        raise CliError(f"{total['leaked']} tickets and {total['leaked_slots']} slots have leaked")
