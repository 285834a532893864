"""`inferctl drain`: let a worker finish and go."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import quote

from inferflux.cli.api import Api
from inferflux.cli.failure import CliError
from inferflux.cli.output import Format, note, print_json

PATH = "/v1/admin/workers"
POLL_S = 0.2
# After its budget a worker still ends its streams, stops its engine and takes itself out of the registry.
EXIT_S = 60.0
Document = dict[str, Any]


def estimate(worker_id: str, output: Format) -> None:
    """Say how long a drain would take, without one."""
    with Api() as api:
        document = api.get(path_of(worker_id))
    load = document["load"] or {}
    document = {key: document[key] for key in ("id", "incarnation", "state", "requests", "eta_s")}
    document["tickets"] = load.get("tickets", 0)
    if output is Format.JSON:
        print_json(document)
    else:
        note(f"{worker_id} has {holds(document)}; a drain would take {spoken(document['eta_s'])}")


def drain(worker_id: str, within_s: float | None, output: Format, *, wait: bool) -> None:
    """Begin a drain, and wait for its end if asked to."""
    began_at = time.monotonic()
    with Api() as api:
        document = api.post(f"{path_of(worker_id)}/drain", {} if within_s is None else {"drain_s": within_s})
        if output is not Format.JSON:
            limit = "without a limit" if document["drain_s"] is None else f"at most {document['drain_s']:.0f} s"
            note(f"{worker_id} is draining: {holds(document)}, {spoken(document['eta_s'])}, {limit}")
        if wait:
            wait_gone(api, document)
            document |= {"state": "gone", "took_s": round(time.monotonic() - began_at, 1)}
    if output is Format.JSON:
        print_json(document)
    elif wait:
        note(f"{worker_id} is gone after {document['took_s']} s")


def wait_gone(api: Api, drained: Document) -> None:
    """Wait until the start of the worker that was drained serves no more. Raises CliError when it stays."""
    limit_s = None if drained["drain_s"] is None else drained["drain_s"] + EXIT_S
    deadline = None if limit_s is None else time.monotonic() + limit_s
    while any(is_same(worker, drained) for worker in api.get(PATH)["data"]):
        if deadline is not None and time.monotonic() > deadline:
            raise CliError(f"{drained['id']} is still there after {limit_s:.0f} s")
        time.sleep(POLL_S)


def is_same(worker: Document, drained: Document) -> bool:
    """Whether this is the start that was drained, and not its successor."""
    return bool(worker["id"] == drained["id"] and worker["incarnation"] == drained["incarnation"])


def path_of(worker_id: str) -> str:
    """Where one worker is."""
    return f"{PATH}/{quote(worker_id, safe='')}"


def holds(document: Document) -> str:
    """Render what a worker still has to do."""
    return f"{document['requests']} requests and {document['tickets']} tickets"


def spoken(eta_s: float | None) -> str:
    """Render an estimate."""
    return "nobody knows how long" if eta_s is None else f"about {eta_s:.1f} s"
