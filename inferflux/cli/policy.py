"""`inferctl policy`: the policy document, over HTTP with an admin key."""

from __future__ import annotations

import json
import sys
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from inferflux.cli.api import Api
from inferflux.cli.failure import CliError, Exit
from inferflux.cli.keys import when
from inferflux.cli.output import Format, note, print_json, print_table

ADMIN = "/v1/admin"
PATH = f"{ADMIN}/policy"
Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Terms:
    """How a document is applied; None: left to the service."""

    reason: str = ""
    expected_revision: int | None = None
    stage: str = "live"
    share: float | None = None
    max_error_excess: float | None = None

    def body(self) -> Document:
        """Render what was given."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in fields.items() if value not in (None, "")}


def get(output: Format) -> None:
    """Print the document in force."""
    with Api() as api:
        state = api.get(PATH)
    if output is Format.JSON:
        print_json(state)
        return
    describe(state)
    if state["candidate"]:
        describe(state["candidate"])
    print_json(state["document"])


def apply(file: str, terms: Terms, output: Format) -> None:
    """Make a file's document the newest revision."""
    body = {"document": read_document(file)} | terms.body()
    with Api() as api:
        made = api.put(PATH, body)
    report(made, output)


def report(made: Document, output: Format) -> None:
    """Say which revision was made."""
    if output is Format.JSON:
        print_json(made)
    else:
        describe(made)


def describe(revision: Document) -> None:
    """Say in one line what a revision is, to people."""
    if not revision["revision"]:
        note("no policy has been applied yet: nothing is restricted")
        return
    share = f" for {revision['share']:.0%} of the traffic" if revision["share"] else ""
    why = f": {revision['reason']}" if revision["reason"] else ""
    made = f"{when(revision['created_at'])} by {revision['author']}"
    note(f"revision {revision['revision']}, {revision['stage']}{share}, {made}{why}")


def read_document(file: str) -> Document:
    """Read a document from a .toml or a JSON file; `-`: JSON from stdin."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        document = tomllib.loads(text) if file.endswith(".toml") else json.loads(text)
    except OSError as e:
        raise CliError(f"cannot read {file}: {e.strerror}", Exit.USAGE) from e
    except ValueError as e:
        raise CliError(f"{file}: {e}", Exit.USAGE) from e
    if not isinstance(document, dict):
        raise CliError(f"{file} holds no JSON object", Exit.USAGE)
    return document


def diff(what: str, against: str | None, output: Format) -> None:
    """Show what a document, or a revision, changes in another one; by default in the one in force."""
    from inferflux.policy.diff import diff as compare  # noqa: PLC0415 - inferctl starts fast

    with Api() as api:
        after = _resolve(api, what)
        before = api.get(PATH)["document"] if against is None else _resolve(api, against)
    show_changes([asdict(change) for change in compare(before, after)], output)


def validate(file: str, output: Format) -> None:
    """Have a document checked without applying it, and show what it would change."""
    with Api() as api:
        answer = api.post(f"{PATH}/validate", {"document": read_document(file)})
    if output is Format.JSON:
        print_json(answer)
        return
    note("the document is valid")
    show_changes(answer["changes"], output)


def simulate(file: str | None, traffic: Path | None, since: str | None, limit: int, output: Format) -> None:
    """Show what a document would have done with recorded requests; by default what is being tried, with the newest."""
    body: Document = {} if file is None else {"document": read_document(file)}
    with Api() as api:
        records = _audited(api, since, limit) if traffic is None else _read_records(traffic, limit)
        if not records:
            raise CliError("there are no recorded requests: set `sample` of the section audit, or give --traffic")
        answer = api.post(f"{PATH}/simulate", body | {"records": records})
    if output is Format.JSON:
        print_json(answer)
        return
    note(", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in answer["summary"].items()))
    if answer["changes"]:
        columns = ("request", "tenant", "key", "before", "after", "why")
        print_table(columns, (_simulated(change) for change in answer["changes"]))


def _audited(api: Api, since: str | None, limit: int) -> list[Document]:
    """Find requests in the audit log, answered and refused ones, in the order in which they came."""
    records: list[Document] = []
    for kind in ("request", "refusal"):
        query = urlencode({"kind": kind, "limit": str(limit), **({"since": since} if since else {})})
        records += (line["record"] for line in api.get(f"{ADMIN}/audit?{query}")["data"])
    return _requests(records, limit)


def _read_records(file: Path, limit: int) -> list[Document]:
    """Read lines of the audit log, or records as `inferctl audit tail` prints them."""
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        return _requests([line.get("record", line) for line in lines], limit)
    except OSError as e:
        raise CliError(f"cannot read {file}: {e.strerror}", Exit.USAGE) from e
    except (ValueError, AttributeError) as e:
        raise CliError(f"{file} is no file of JSON objects, one a line", Exit.USAGE) from e


def _requests(records: list[Document], limit: int) -> list[Document]:
    """Keep the newest requests for inference."""
    kept = [r for r in records if ("tenant" in r and "model" in r) or r.get("prompt")]
    return sorted(kept, key=lambda record: str(record.get("at", "")))[-limit:]


def _simulated(change: Document) -> tuple[str, ...]:
    before, after = (_opinion(change[name]) for name in ("before", "after"))
    why = change["after"]["message"] or change["before"]["message"]
    return change["request_id"], change["tenant"], change["key_id"], before, after, why


def _opinion(opinion: Document) -> str:
    return opinion["refusal"] or ("redact" if opinion["is_redacted"] else "allow")


def promote(terms: Terms, output: Format) -> None:
    """Let what is being tried get further."""
    with Api() as api:
        report(api.post(f"{PATH}/promote", terms.body()), output)


def rollback(revision: int | None, reason: str, expect: int | None, output: Format) -> None:
    """Go back to a revision; by default to the live one before the last, or away from what is being tried."""
    with Api() as api:
        number = _previous(api) if revision is None else revision
        body: Document = {"revision": number, "reason": reason or f"back to {number}"}
        report(api.post(f"{PATH}/rollback", body | ({} if expect is None else {"expected_revision": expect})), output)


def history(limit: int, output: Format) -> None:
    """List revisions, newest first."""
    with Api() as api:
        answer = api.get(f"{PATH}/revisions?limit={limit}")
    if output is Format.JSON:
        print_json(answer)
        return
    columns = ("revision", "stage", "share", "author", "when", "changes", "reason")
    print_table(columns, (_row(revision) for revision in answer["data"]))


def status(output: Format) -> None:
    """Show which gateway uses which revision."""
    with Api() as api:
        answer = api.get(f"{PATH}/status")
    if output is Format.JSON:
        print_json(answer)
        return
    note(f"newest revision {answer['revision']}")
    columns = ("gateway", "revision", "behind for", "policy", "trying", "tried", "failed", "reported")
    print_table(columns, (_replica(replica) for replica in answer["data"]))


def get_view(name: str, output: Format) -> None:
    """Print a part of the document."""
    with Api() as api:
        answer = api.get(f"{ADMIN}/{name}")
    if output is Format.JSON:
        print_json(answer)
    elif answer["value"] is None:
        note("nothing is set: nothing is restricted")
    else:
        print_json(answer["value"])


def set_view(name: str, file: str, reason: str, expect: int | None, output: Format) -> None:
    """Replace a part of the document."""
    body: Document = {"value": read_document(file), "reason": reason}
    with Api() as api:
        answer = api.put(f"{ADMIN}/{name}", body | ({} if expect is None else {"expected_revision": expect}))
    _said(answer, output)


def delete_view(name: str, output: Format) -> None:
    """Take a part out of the document."""
    with Api() as api:
        _said(api.delete(f"{ADMIN}/{name}"), output)


def _said(answer: Document, output: Format) -> None:
    if output is Format.JSON:
        print_json(answer)
    else:
        note(f"revision {answer['revision']}, live")


def show_changes(changes: list[Document], output: Format) -> None:
    """Print differences: + added, - removed, ~ changed."""
    if output is Format.JSON:
        print_json({"object": "list", "data": changes})
        return
    if not changes:
        note("no difference")
    signs = {"added": "+", "removed": "-", "changed": "~"}
    rows = ((signs[c["kind"]], c["path"], _brief(c["before"]), _brief(c["after"])) for c in changes)
    if changes:
        print_table(("", "path", "before", "after"), rows)


def _resolve(api: Api, what: str) -> Document:
    """Read the document of a revision number or of a file."""
    if what.isdecimal():
        document: Document = api.get(f"{PATH}/revisions/{what}")["document"]
        return document
    return read_document(what)


def _previous(api: Api) -> int:
    """Find what to go back to: the live revision while something is being tried, else the one before it."""
    state = api.get(PATH)
    if state["candidate"]:
        return int(state["revision"])
    revisions = api.get(f"{PATH}/revisions?limit=1000")["data"]
    older = [r for r in revisions if r["stage"] == "live" and r["revision"] < state["revision"]]
    if not older:
        raise CliError("there is no earlier revision")
    return int(older[0]["revision"])


def _row(revision: Document) -> tuple[str, ...]:
    share = f"{revision['share']:.0%}" if revision["share"] else ""
    changes = ", ".join(change["path"] for change in revision["changes"][:4])
    more = f" and {len(revision['changes']) - 4} more" if len(revision["changes"]) > 4 else ""
    made = revision["author"], when(revision["created_at"])
    return str(revision["revision"]), revision["stage"], share, *made, changes + more, revision["reason"]


def _replica(replica: Document) -> tuple[str, ...]:
    trying = str(replica["candidate_revision"] or "") + (" (refused)" if replica["is_candidate_refused"] else "")
    lag, age = f"{replica['lag_s']:.1f} s" if replica["lag_s"] else "", f"{replica['age_s']:.0f} s ago"
    tried = (str(replica[name]) if trying else "" for name in ("num_tried", "num_failed"))
    return replica["gateway_id"], str(replica["revision"]), lag, str(replica["policy_revision"]), trying, *tried, age


def _brief(value: object) -> str:
    return "" if value is None else json.dumps(value)[:80]
