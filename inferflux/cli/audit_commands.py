"""The commands below `inferctl audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from inferflux.cli.output import Format

app = typer.Typer(help="The audit log.", no_args_is_help=True)
Output = Annotated[Format, typer.Option("-o", "--output", help="How to print the result.")]
Limit = Annotated[int, typer.Option("-n", "--limit", min=1, max=1000, help="At most so many.")]
Text = Optional[str]  # noqa: UP045 - typer


@app.command("verify")
def verify(
    directory: Annotated[Optional[Path], typer.Argument(help="Default: audit in INFERFLUX_HOME.")] = None,  # noqa: UP045
    public_key: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--public-key", help="Default: snapshot.pub of INFERFLUX_HOME."),
    ] = None,
    output: Output = Format.TABLE,
) -> None:
    """Prove that nothing in a log was changed, moved, put in or cut out; else name the first bad line."""
    from inferflux.cli import audit  # noqa: PLC0415 - inferctl starts fast

    audit.check(directory, public_key, output)


@app.command("tail")
def tail(
    limit: Limit = 20,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on printing, as JSON lines.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Print the last records."""
    from inferflux.cli import audit  # noqa: PLC0415

    if follow:
        audit.follow({}, limit)
    else:
        audit.search({}, None, limit, output)


@app.command("search")
def search(
    kind: Annotated[Text, typer.Option(help="admin, refusal or request.")] = None,
    actor: Annotated[Text, typer.Option(help="Key of an administrator.")] = None,
    key: Annotated[Text, typer.Option("--key", help="Key of an inference request.")] = None,
    tenant: Annotated[Text, typer.Option(help="Whose.")] = None,
    request: Annotated[Text, typer.Option("--request", help="x-request-id of the answer.")] = None,
    reason: Annotated[Text, typer.Option(help="Of a refusal, e.g. UNAUTHENTICATED.")] = None,
    path: Annotated[Text, typer.Option(help="Of the request, e.g. /v1/chat/completions.")] = None,
    since: Annotated[Text, typer.Option(help="Time in ISO 8601; UTC unless it says otherwise.")] = None,
    limit: Limit = 100,
    output: Output = Format.TABLE,
) -> None:
    """Find records by what they say."""
    from inferflux.cli import audit  # noqa: PLC0415

    asked = {"kind": kind, "actor": actor, "key_id": key, "tenant": tenant, "request_id": request}
    fields = {name: value for name, value in (asked | {"reason": reason, "path": path}).items() if value is not None}
    audit.search(fields, since, limit, output)
