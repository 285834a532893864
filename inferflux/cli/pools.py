"""`inferctl pools`: the registered workers, and how KV blocks get from one to the other."""

from __future__ import annotations

from typing import Any

from inferflux.cli.api import Api
from inferflux.cli.output import Format, print_json, print_table

WORKERS = ("id", "role", "model", "state", "transports", "host")
PATHS = ("decode", "prefill", "transport", "GB/s", "state")


def show_workers(output: Format) -> None:
    """Print the workers that the registry knows."""
    with Api() as api:
        answer = api.get("/v1/admin/workers")
    if output is Format.JSON:
        print_json(answer)
        return
    print_table(WORKERS, (_worker(document) for document in answer["data"]))


def show_matrix(output: Format) -> None:
    """Let every decode worker read from every prefill worker, and print how that went."""
    with Api() as api:
        answer = api.get("/v1/admin/paths")
    if output is Format.JSON:
        print_json(answer)
        return
    print_table(PATHS, (_path(document) for document in answer["data"]))


def _worker(worker: dict[str, Any]) -> tuple[str, ...]:
    transports = ", ".join(worker["transports"])
    return worker["id"], worker["role"], worker["model"], worker["state"], transports, worker["host_id"][:8]


def _path(path: dict[str, Any]) -> tuple[str, ...]:
    speed = f"{path['gbps']:.2f}" if path["gbps"] else ""
    return path["decode"], path["prefill"], path["transport"], speed, path["state"]
