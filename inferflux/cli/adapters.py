"""`inferctl adapters load|unload|list`: LoRA adapters, and which workers hold them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from inferflux.cli.api import Api
from inferflux.cli.failure import CliError
from inferflux.cli.output import Format, note, print_json, print_table

PATH = "/v1/admin/adapters"
COLUMNS = ("adapter", "model", "workers", "tenants", "pinned", "source")
LOAD_S = 120.0
POLL_S = 0.2
Document = dict[str, Any]


def load(adapter: Mapping[str, Any], output: Format) -> None:
    """Load an adapter, or its files anew, and wait until all workers of its model have it. Raises CliError."""
    source = Path(adapter["source"]).expanduser()
    given = {**adapter, "source": str(source.resolve() if source.is_dir() else source)}
    with Api() as api:
        revision = api.post(PATH, given)["revision"]
        last = wait(api, given["name"], revision)
    if output is Format.JSON:
        print_json(last)
        return
    note(f"{last['id']} is on {', '.join(worker['id'] for worker in last['workers'])}")


def wait(api: Api, name: str, revision: int) -> Document:
    """Wait until no worker is loading; returns the adapter as it is then. Raises CliError when one can't hold it."""
    deadline = time.monotonic() + LOAD_S
    while time.monotonic() < deadline:
        found = next((a for a in api.get(PATH)["data"] if a["id"] == name and a["revision"] >= revision), None)
        if found is None:
            raise CliError(f"{name} was unloaded meanwhile")
        if failed := [worker for worker in found["workers"] if worker["state"] == "failed"]:
            raise CliError("; ".join(f"{worker['id']}: {worker['error']}" for worker in failed))
        if found["workers"] and all(worker["state"] == "loaded" for worker in found["workers"]):
            return dict(found)
        time.sleep(POLL_S)
    raise CliError(f"{name} is not on all workers after {LOAD_S:.0f} s")


def unload(name: str, output: Format) -> None:
    """Forget an adapter; requests that use it end in peace."""
    with Api() as api:
        answer = api.delete(f"{PATH}/{quote(name, safe='')}")
    if output is Format.JSON:
        print_json(answer)
        return
    note(f"{name} is unloaded")


def show(output: Format) -> None:
    """Print all adapters."""
    with Api() as api:
        answer = api.get(PATH)
    if output is Format.JSON:
        print_json(answer)
        return
    print_table(COLUMNS, map(row, answer["data"]))


def row(adapter: Document) -> tuple[Any, ...]:
    """Render an adapter for people."""
    states = [worker["state"] for worker in adapter["workers"]]
    workers = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "none"
    tenants = " ".join(adapter["tenants"]) or "all"
    return adapter["id"], adapter["model"], workers, tenants, adapter["is_pinned"], adapter["source"]
