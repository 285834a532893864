"""`inferctl pools`: the registered workers, and how KV blocks get from one to the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from inferflux.cli.api import Api
from inferflux.cli.output import Format, print_json, print_table

WORKERS = ("id", "role", "model", "state", "transports", "host")
PATHS = ("decode", "prefill", "transport", "GB/s", "state")


def show_workers(output: Format) -> None:
    """Print the workers that the registry knows."""
    _show("/v1/admin/workers", WORKERS, _worker, output)


def show_matrix(output: Format) -> None:
    """Let every decode worker read from every prefill worker, and print how that went."""
    _show("/v1/admin/paths", PATHS, _path, output)


def _show(
    path: str, headings: tuple[str, ...], row: Callable[[dict[str, Any]], tuple[str, ...]], output: Format
) -> None:
    with Api() as api:
        answer = api.get(path)
    if output is Format.JSON:
        print_json(answer)
        return
    print_table(headings, map(row, answer["data"]))


def _worker(worker: dict[str, Any]) -> tuple[str, ...]:
    transports = ", ".join(worker["transports"])
    return worker["id"], worker["role"], worker["model"], worker["state"], transports, worker["host_id"][:8]


def _path(path: dict[str, Any]) -> tuple[str, ...]:
    speed = f"{path['gbps']:.2f}" if path["gbps"] else ""
    return path["decode"], path["prefill"], path["transport"], speed, path["state"]
