"""The commands below `inferctl policy`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Optional

import typer

from inferflux.cli.output import Format

app = typer.Typer(help="The policy document: what administrators decide.", no_args_is_help=True)
Output = Annotated[Format, typer.Option("-o", "--output", help="How to print the result.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; it is kept with the revision.")]
Expected = Annotated[
    Optional[int],  # noqa: UP045 - typer
    typer.Option("--expect", metavar="REVISION", help="Fail unless this is the newest revision."),
]


class StageName(StrEnum):
    """Value of --stage."""

    LIVE = "live"
    CANARY = "canary"
    SHADOW = "shadow"


@app.command("get")
def get(output: Output = Format.TABLE) -> None:
    """Print the document in force."""
    from inferflux.cli import policy  # noqa: PLC0415 - inferctl starts fast

    policy.get(output)


@app.command("apply")
def apply(
    file: Annotated[str, typer.Argument(help="JSON or .toml; - reads JSON from stdin.")],
    reason: Reason = "",
    stage: Annotated[StageName, typer.Option(help="shadow only reports; canary decides for a share.")] = StageName.LIVE,
    share: Annotated[Optional[float], typer.Option(min=0.0, max=1.0, help="Of a canary's traffic.")] = None,  # noqa: UP045
    max_error_excess: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--max-error-excess", min=0.0, max=1.0, help="More failures than this revert a canary."),
    ] = None,
    expect: Expected = None,
    output: Output = Format.TABLE,
) -> None:
    """Make a document the newest revision; all its problems are listed when it is wrong."""
    from inferflux.cli import policy  # noqa: PLC0415

    policy.apply(file, policy.Terms(reason, expect, str(stage), share, max_error_excess), output)
