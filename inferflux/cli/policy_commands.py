"""The commands below `inferctl policy`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
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


File = Annotated[str, typer.Argument(help="JSON or .toml; - reads JSON from stdin.")]
Share = Annotated[Optional[float], typer.Option("--share", min=0.0, max=1.0, help="Of a canary's traffic.")]  # noqa: UP045
Excess = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--max-error-excess", min=0.0, max=1.0, help="More failures than this revert a canary."),
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
    file: File,
    reason: Reason = "",
    stage: Annotated[StageName, typer.Option(help="shadow only reports; canary decides for a share.")] = StageName.LIVE,
    share: Share = None,
    max_error_excess: Excess = None,
    expect: Expected = None,
    output: Output = Format.TABLE,
) -> None:
    """Make a document the newest revision; all its problems are listed when it is wrong."""
    from inferflux.cli import policy  # noqa: PLC0415

    policy.apply(file, policy.Terms(reason, expect, str(stage), share, max_error_excess), output)


@app.command("validate")
def validate(file: File, output: Output = Format.TABLE) -> None:
    """Check a document without applying it, and show what it would change."""
    from inferflux.cli import policy  # noqa: PLC0415

    policy.validate(file, output)


@app.command("simulate")
def simulate(
    file: Annotated[Optional[str], typer.Argument(help="Default: what is being tried.")] = None,  # noqa: UP045
    traffic: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Lines of the audit log; default: ask for the newest requests in it."),
    ] = None,
    since: Annotated[Optional[str], typer.Option(help="Only requests from then on, in ISO 8601.")] = None,  # noqa: UP045
    limit: Annotated[int, typer.Option("-n", "--limit", min=1, max=1000, help="At most so many requests.")] = 1000,
    output: Output = Format.TABLE,
) -> None:
    """Show what a document would have done with recorded requests, beside what is in force."""
    from inferflux.cli import policy  # noqa: PLC0415

    policy.simulate(file, traffic, since, limit, output)


@app.command("diff")
def diff(
    what: Annotated[str, typer.Argument(help="A file, or the number of a revision.")],
    against: Annotated[Optional[str], typer.Argument(help="Another one; default: what is in force.")] = None,  # noqa: UP045
    output: Output = Format.TABLE,
) -> None:
    """Show what a document changes."""
    from inferflux.cli import policy  # noqa: PLC0415

    policy.diff(what, against, output)


@app.command("promote")
def promote(
    stage: Annotated[StageName, typer.Option(help="How far it shall get.")] = StageName.LIVE,
    share: Share = None,
    max_error_excess: Excess = None,
    reason: Reason = "",
    expect: Expected = None,
    output: Output = Format.TABLE,
) -> None:
    """Let what is being tried get further: from shadow to canary, from canary to live."""
    from inferflux.cli import policy  # noqa: PLC0415

    policy.promote(policy.Terms(reason, expect, str(stage), share, max_error_excess), output)


@app.command("rollback")
def rollback(
    revision: Annotated[Optional[int], typer.Argument(help="Default: the live one before the last.")] = None,  # noqa: UP045
    reason: Reason = "",
    expect: Expected = None,
    output: Output = Format.TABLE,
) -> None:
    """Make the document of an earlier revision the newest one; without a revision, end what is being tried."""
    from inferflux.cli import policy  # noqa: PLC0415

    policy.rollback(revision, reason, expect, output)


@app.command("history")
def history(
    limit: Annotated[int, typer.Option("-n", "--limit", min=1, max=1000, help="At most so many.")] = 20,
    output: Output = Format.TABLE,
) -> None:
    """List revisions with what they changed, newest first."""
    from inferflux.cli import policy  # noqa: PLC0415

    policy.history(limit, output)


@app.command("status")
def status(output: Output = Format.TABLE) -> None:
    """Show which gateway uses which revision, and how far behind it is."""
    from inferflux.cli import policy  # noqa: PLC0415

    policy.status(output)


def view_app(name: str, title: str) -> typer.Typer:
    """Make the commands below `inferctl admin` for a part of the document."""
    below = typer.Typer(help=f"{title}, a part of the policy document.", no_args_is_help=True)

    @below.command("get")
    def get(output: Output = Format.TABLE) -> None:
        """Print what is in force."""
        from inferflux.cli import policy  # noqa: PLC0415

        policy.get_view(name, output)

    @below.command("set")
    def put(file: File, reason: Reason = "", expect: Expected = None, output: Output = Format.TABLE) -> None:
        """Put a file's content in its place; the rest of the document stays."""
        from inferflux.cli import policy  # noqa: PLC0415

        policy.set_view(name, file, reason, expect, output)

    @below.command("delete")
    def delete(output: Output = Format.TABLE) -> None:
        """Take it out of the document: then it restricts nothing."""
        from inferflux.cli import policy  # noqa: PLC0415

        policy.delete_view(name, output)

    return below
