"""`inferctl models load|unload|default|list`: which models the cluster has, and how far it is with them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from inferflux.cli.api import Api
from inferflux.cli.failure import CliError, Exit
from inferflux.cli.output import Format, note, print_json, print_table
from inferflux.cli.progress import Steps
from inferflux.cli.scaling import setting

PATH = "/v1/admin/models"
COLUMNS = ("model", "state", "workers", "source", "revision", "error")
Document = dict[str, Any]


def load(spec: Mapping[str, Any], output: Format) -> None:
    """Load a model and show how far it is. Raises CliError with the reason when it can't be served."""
    with Api() as api:
        last = follow(api.lines("POST", PATH, {**spec, "stream": True}))
    if last["state"] != "ready":
        raise CliError(f"{spec['model']} is not loaded: {last.get('error') or last['state']}")
    tell(last, output)


def unload(model: str, output: Format) -> None:
    """Drain a model's workers and forget it."""
    with Api() as api:
        last = follow(api.lines("DELETE", f"{PATH}/{quote(model, safe='')}?stream=true"))
    if last["state"] != "unloaded":
        raise CliError(f"{model} is not unloaded: {last.get('error') or last['state']}")
    tell(last, output)


def choose_default(model: str, output: Format) -> None:
    """Make a model the default."""
    with Api() as api:
        answer = api.put(f"{PATH}/default", {"model": model})
    if output is Format.JSON:
        print_json(answer)
        return
    note(f"{model} is the default model")


def show(output: Format) -> None:
    """Print all models and what the cluster does with them."""
    with Api() as api:
        answer = api.get(PATH)
    if output is Format.JSON:
        print_json(answer)
        return
    print_table(COLUMNS, map(row, answer["data"]))


def spec_of(model: str, source: str | None, sizes: Mapping[str, int], settings: list[str]) -> Document:
    """Put together what to load. A folder that is here is named by its whole path; a cluster elsewhere has its own."""
    given = source or model
    if os.sep in given and Path(given).expanduser().is_dir():
        given = str(Path(given).expanduser().resolve())
    return {"model": model, "source": given, **sizes, "settings": dict(map(text_setting, settings))}


def text_setting(text: str) -> tuple[str, Any]:
    """Read KEY=VALUE. Raises CliError."""
    key, value = setting(text)
    if not isinstance(value, str | int):
        raise CliError(f"--set {text!r}: neither text, a whole number, true nor false", Exit.USAGE)
    return key, value


def follow(documents: Iterator[Document]) -> Document:
    """Show each document as it comes; returns the last one."""
    last: Document = {"state": "unknown"}
    with Steps() as steps:
        for last in documents:
            if last.get("step"):
                steps.update(f"{last['id']}: {last['step']}", last["fraction"])
            for worker in last.get("workers", ()):
                progress(steps, worker)
    return last


def progress(steps: Steps, worker: Document) -> None:
    """Show one worker."""
    if worker["state"] == "ready":
        steps.finish(worker["id"], "ready")
    else:
        steps.update(worker["id"], None, worker["reason"] or worker["state"])


def tell(document: Document, output: Format) -> None:
    """Print how it ended."""
    if output is Format.JSON:
        print_json(document)
        return
    note(f"{document['id']} is {document['state']}")


def row(document: Document) -> tuple[Any, ...]:
    """Render a deployment for people."""
    spec = document["spec"] or {}
    states = [worker["state"] for worker in document["workers"]]
    workers = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "none"
    source = spec.get("source") or "came with the cluster"
    return document["id"], document["state"], workers, source, spec.get("revision"), document["error"]
