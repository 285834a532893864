"""The verbs of `inferctl pools`. As thin as those of `main`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Optional

import typer

from inferflux.cli.output import Format

pools_app = typer.Typer(invoke_without_command=True)

Output = Annotated[Format, typer.Option("-o", "--output", help="How to print the result.")]
PoolName = Annotated[str, typer.Argument(help="As ROLE/MODEL, or the role when there is one model.")]
AnyPool = Annotated[Optional[str], typer.Argument(help="As ROLE/MODEL, or a role; default: all.")]  # noqa: UP045


class ModeName(StrEnum):
    """Value of --mode."""

    ADVISE = "advise"
    ACT = "act"


@pools_app.callback()
def pools(
    context: typer.Context,
    matrix: Annotated[bool, typer.Option("--matrix", help="Measure every pair of decode and prefill worker.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Show the registered workers, or how fast KV gets from one to the other; size pools."""
    from inferflux.cli.pools import show_matrix, show_workers  # noqa: PLC0415

    if context.invoked_subcommand is None:
        (show_matrix if matrix else show_workers)(output)


@pools_app.command("get")
def get(pool: AnyPool = None, output: Output = Format.TABLE) -> None:
    """Show pools: what they have, what they should have, and within which bounds."""
    from inferflux.cli import scaling  # noqa: PLC0415

    scaling.get(pool, output)


@pools_app.command("scale")
def scale(
    pool: PoolName,
    size: Annotated[Optional[int], typer.Argument(min=1, help="Exactly so many workers.")] = None,  # noqa: UP045
    at_least: Annotated[Optional[int], typer.Option("--min", min=1, help="At least so many.")] = None,  # noqa: UP045
    at_most: Annotated[Optional[int], typer.Option("--max", min=1, help="At most so many.")] = None,  # noqa: UP045
    mode: Annotated[Optional[ModeName], typer.Option(help="Whether the planner may act.")] = None,  # noqa: UP045
    settings: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="KEY=VALUE", help="Another field of the spec; may be given several times."),
    ] = None,
    output: Output = Format.TABLE,
) -> None:
    """Say how many workers a pool should have: a number, or bounds within which the planner decides."""
    from inferflux.cli import scaling  # noqa: PLC0415

    scaling.scale(pool, scaling.changes(size, at_least, at_most, mode, settings or []), output)


@pools_app.command("explain")
def explain(pool: PoolName, output: Output = Format.TABLE) -> None:
    """Say why a pool should have the size it should have, with everything that was considered."""
    from inferflux.cli import scaling  # noqa: PLC0415

    scaling.explain(pool, output)
