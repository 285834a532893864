"""The verbs of `inferctl adapters`. As thin as those of `main`."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from inferflux.cli.output import Format

app = typer.Typer(help="LoRA adapters.", no_args_is_help=True, add_completion=False)
Output = Annotated[Format, typer.Option("-o", "--output", help="How to print the result.")]


@app.command("list")
def show(output: Output = Format.TABLE) -> None:
    """List all adapters and the workers that hold them."""
    from inferflux.cli import adapters  # noqa: PLC0415 - inferctl starts fast

    adapters.show(output)


@app.command("load")
def load(
    name: Annotated[str, typer.Argument(help="Its name in API calls.")],
    source: Annotated[str, typer.Argument(help="Its folder, which the workers can read.")],
    model: Annotated[str, typer.Option(help="The model that it is for.")],
    tenant: Annotated[
        Optional[list[str]],  # noqa: UP045 - typer
        typer.Option(help="Who may use it, by default everybody; may be given several times."),
    ] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Keep its weights where they can be used at once.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Load an adapter, or its changed files; requests that run keep what they began with."""
    from inferflux.cli import adapters  # noqa: PLC0415

    given = {"name": name, "model": model, "source": source, "tenants": tenant or [], "is_pinned": pin}
    adapters.load(given, output)


@app.command("unload")
def unload(name: Annotated[str, typer.Argument(help="Its name.")], output: Output = Format.TABLE) -> None:
    """Forget an adapter; requests that use it are answered."""
    from inferflux.cli import adapters  # noqa: PLC0415

    adapters.unload(name, output)
