"""The commands below `inferctl admin guardrails`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Optional

import typer

from inferflux.cli.output import Format
from inferflux.cli.policy_commands import view_app

app = view_app("guardrails", "Guardrails")


class SideName(StrEnum):
    """Value of --side."""

    INPUT = "input"
    OUTPUT = "output"


@app.command("test")
def dry_run(
    text: Annotated[Optional[str], typer.Option(help="The text; default: stdin.")] = None,  # noqa: UP045 - typer
    side: Annotated[SideName, typer.Option(help="To the model, or back.")] = SideName.INPUT,
    model: Annotated[str, typer.Option(help="Rules for this model are tried, too.")] = "",
    tenant: Annotated[str, typer.Option(help="Whose rules; default: your key's tenant.")] = "",
    file: Annotated[str, typer.Option(help="A policy document to try, instead of the one in force.")] = "",
    output: Annotated[Format, typer.Option("-o", "--output", help="How to print the result.")] = Format.TABLE,
) -> None:
    """Say what the rules would do to a text. Nothing is counted, nothing is changed."""
    from inferflux.cli import guardrails  # noqa: PLC0415 - inferctl starts fast

    guardrails.dry_run(text, {"side": str(side), "model": model, "tenant": tenant}, file, output)
