"""`inferctl audit`: the audit log, by HTTP with an admin key, or as files of this machine."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import orjson

from inferflux.audit import Head, Verdict, verify
from inferflux.cli.api import Api
from inferflux.cli.failure import CliError, Exit
from inferflux.cli.output import Format, note, print_json, print_table
from inferflux.errors import ConfigError
from inferflux.paths import Home
from inferflux.policy.signature import PUBLIC_FILE, Verifier

PATH = "/v1/admin/audit"
POLL_S = 1.0
FILE_NAME = re.compile(r"(?P<chain>.+)-[0-9]{12}\.jsonl")
Document = dict[str, Any]


def search(fields: Mapping[str, str], since: str | None, limit: int, output: Format) -> None:
    """Print the newest records with these fields, oldest first."""
    with Api() as api:
        lines = _ask(api, fields, since, limit)
    if output is Format.JSON:
        print_json({"object": "list", "data": lines})
    else:
        print_table(("at", "kind", "who", "tenant", "what", "status", "reason", "request"), map(_row, lines))


def follow(fields: Mapping[str, str], limit: int) -> None:
    """Print records as JSON lines, the last ones and then each new one, until interrupted."""
    seen: dict[str, None] = {}
    with Api() as api:
        while True:
            for line in _ask(api, fields, None, limit):
                if line["hash"] not in seen:
                    seen[line["hash"]] = None
                    print(json.dumps(line["record"]), flush=True)  # noqa: T201 - the result; escapes all but ASCII
            seen = dict.fromkeys(list(seen)[-10 * limit :])
            time.sleep(POLL_S)


def check(directory: Path | None, public_key: Path | None, output: Format) -> None:
    """Check all chains of a directory. Raises CliError that names the first bad line of the first bad chain."""
    home = Home.from_env(os.environ)
    directory = directory or home.root / "audit"
    try:
        verifier = Verifier.load(public_key or home.secrets / PUBLIC_FILE)
    except ConfigError as e:
        raise CliError(e.message, Exit.USAGE) from e
    chains = _chains(directory)
    if not chains:
        raise CliError(f"there is no audit log in {directory}", Exit.USAGE)
    verdicts = {chain: _verify(directory, chain, paths, verifier) for chain, paths in chains.items()}
    _report(verdicts, output)
    for chain, verdict in verdicts.items():
        if verdict.problem:
            place = _place(chains[chain], verdict.bad_line)
            raise CliError(f"{place}: line {verdict.bad_line} of {chain} {verdict.problem}")


def _ask(api: Api, fields: Mapping[str, str], since: str | None, limit: int) -> list[Document]:
    query = urlencode({**fields, **({"since": since} if since else {}), "limit": str(limit)})
    lines: list[Document] = api.get(f"{PATH}?{query}")["data"]
    return lines


def _row(line: Document) -> tuple[str, ...]:
    record = line["record"]
    what = " ".join(filter(None, (record.get("method"), record.get("path"), record.get("action"))))
    what += f" ({record['phase']})" if record["kind"] == "admin" and "phase" in record else ""
    who = record.get("actor") or record.get("key_id") or ""
    cells = (record["at"], record["kind"], who, record.get("tenant"), what, record.get("status"), record.get("reason"))
    return tuple(_plain(cell) for cell in (*cells, record.get("request_id")))


def _plain(cell: object) -> str:
    """Leave nothing in a cell that a terminal would obey."""
    return "".join(c if c.isprintable() else "\ufffd" for c in str(cell)) if cell is not None else ""


def _chains(directory: Path) -> dict[str, list[Path]]:
    """Find the files of each chain, oldest first."""
    chains: dict[str, list[Path]] = {}
    for path in sorted(directory.glob("*.jsonl")):
        if match := FILE_NAME.fullmatch(path.name):
            chains.setdefault(match["chain"], []).append(path)
    for path in directory.glob("*.head.json"):
        chains.setdefault(path.name.removesuffix(".head.json"), [])
    return chains


def _verify(directory: Path, chain: str, paths: list[Path], verifier: Verifier) -> Verdict:
    last, problem = _last_head(directory / f"{chain}.head.json", chain, verifier)
    verdict = verify(_lines(paths), chain, verifier, last)
    if not verdict.problem and problem:
        verdict.bad_line, verdict.problem = verdict.end.seq, problem
    return verdict


def _last_head(path: Path, chain: str, verifier: Verifier) -> tuple[Head | None, str]:
    """Read the head that is kept beside the log; or say what is wrong with it."""
    if not path.exists():
        return None, ""
    try:
        fields = orjson.loads(path.read_bytes())
        head = Head(chain, int(fields["seq"]), str(fields["hash"]))
        if head.is_signed_by(fields["signature"], verifier):
            return head, ""
    except (ValueError, KeyError, TypeError):
        pass
    return None, f"is the end, but {path.name} is not signed by a known key"


def _lines(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as file:
            yield from file


def _place(paths: list[Path], bad_line: int) -> str:
    """Name file and line, by counting; behind the end of all files it is the last file."""
    passed = 0
    for path in paths:
        with path.open("rb") as file:
            count = sum(1 for _ in file)
        if bad_line <= passed + count:
            return f"{path}:{bad_line - passed}"
        passed += count
    return str(paths[-1]) if paths else "nothing is left"


def _report(verdicts: Mapping[str, Verdict], output: Format) -> None:
    rows = {
        chain: {
            "lines": verdict.end.seq,
            "heads": verdict.num_heads,
            "unsigned": verdict.num_unsigned,
            "bad_line": verdict.bad_line or None,
            "problem": verdict.problem,
        }
        for chain, verdict in verdicts.items()
    }
    if output is Format.JSON:
        print_json(rows)
        return
    for chain, row in rows.items():
        note(f"{chain}: {row['lines']} good lines, {row['heads']} heads, {row['unsigned']} lines not signed yet")
