"""`inferctl registry ...`: the commands, thin; the work is in inferflux.cli.registry and inferflux.cli.release."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from inferflux.cli.output import Format

app = typer.Typer(help="Signed models and their versions.", no_args_is_help=True)

Output = Annotated[Format, typer.Option("-o", "--output", help="How to print the result.")]
Folder = Annotated[Path, typer.Argument(help="A model's folder.", exists=True, file_okay=False)]
TrustedKeys = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--keys", help="Directory of trusted keys; default: those of this home's workers."),
]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Name of the model.")]


@app.command("keygen")
def registry_keygen(
    name: Annotated[str, typer.Argument(help="What to call it.")] = "release",
    out: Annotated[Optional[Path], typer.Option(help="Where; default: this home, whose workers trust it then.")] = None,  # noqa: UP045
    root: Annotated[Optional[Path], typer.Option(help="Make a certificate below this root (.crt).")] = None,  # noqa: UP045
    new_root: Annotated[bool, typer.Option("--new-root", help="Make a root for certificates.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Make a key that signs models: EC P-256, alone or with a certificate."""
    from inferflux.cli import registry  # noqa: PLC0415

    registry.make_key(registry.NewKey(name, out, root, new_root), output)


@app.command("sign")
def registry_sign(
    folder: Folder,
    key: Annotated[Path, typer.Option(help="Private key.", exists=True)],
    name: Annotated[Optional[str], typer.Option(help="Name of the model; default: the folder's.")] = None,  # noqa: UP045
    version: Annotated[int, typer.Option(min=0, help="0: one more than the folder's last.")] = 0,
    certificate: Annotated[list[Path], typer.Option(help="The key's certificate, then those above it.")] = [],  # noqa: B006
    licence: Annotated[str, typer.Option(help="SPDX identifier.")] = "",
    capability: Annotated[
        list[str], typer.Option(help="What the model can do; default: what a language model can.")
    ] = [],  # noqa: B006
    source: Annotated[str, typer.Option(help="Where the model comes from, a URL.")] = "",
    evaluation: Annotated[Optional[Path], typer.Option(help="JSON file with evaluation results.")] = None,  # noqa: UP045
    no_numerics: Annotated[bool, typer.Option("--no-numerics", help="Make no reference of what it computes.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Write a model's manifest and provenance into its folder and sign all its files."""
    from inferflux.cli import registry, release  # noqa: PLC0415

    wish = release.Wish(
        folder=folder,
        key=key,
        name=name or folder.resolve().name,
        version=version,
        chain=tuple(certificate),
        licence=licence,
        capabilities=tuple(map(str, capability)),
        source=source,
        evaluation=evaluation,
        numerics=not no_numerics,
    )
    registry.sign(wish, output)


@app.command("verify")
def registry_verify(folder: Folder, keys: TrustedKeys = None, output: Output = Format.TABLE) -> None:
    """Check a signed model as a worker would."""
    from inferflux.cli import registry  # noqa: PLC0415

    registry.check(folder, keys, output)


@app.command("push")
def registry_push(folder: Folder, keys: TrustedKeys = None, output: Output = Format.TABLE) -> None:
    """Verify a signed model and make its version known to the registry."""
    from inferflux.cli import registry  # noqa: PLC0415

    registry.push(folder, keys, output)


@app.command("promote")
def registry_promote(
    model: ModelArgument,
    version: Annotated[int, typer.Argument(min=1, help="A pushed version.")],
    output: Output = Format.TABLE,
) -> None:
    """Make a version the current one; workers refuse older ones from then on."""
    from inferflux.cli import registry  # noqa: PLC0415

    registry.promote(model, version, output)


@app.command("rollback")
def registry_rollback(model: ModelArgument, output: Output = Format.TABLE) -> None:
    """Go back to the version that was current before."""
    from inferflux.cli import registry  # noqa: PLC0415

    registry.roll_back(model, output)


@app.command("history")
def registry_history(model: ModelArgument, output: Output = Format.TABLE) -> None:
    """Show all versions of a model and what was done with them."""
    from inferflux.cli import registry  # noqa: PLC0415

    registry.show_history(model, output)


@app.command("revoke")
def registry_revoke(
    key_id: Annotated[str, typer.Argument(help="SHA-256 of the key, as `verify` prints it.")],
    output: Output = Format.TABLE,
) -> None:
    """End the trust in a signing key, for ever."""
    from inferflux.cli import registry  # noqa: PLC0415

    registry.revoke(key_id, output)
