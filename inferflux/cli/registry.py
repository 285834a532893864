"""`inferctl registry`: keys that sign models, signed models, and which version of each counts.

Signing and verifying need nothing but files. What concerns versions goes to the registry over gRPC, with the operator's
certificate of the home.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from inferflux.cli.failure import CliError, Exit
from inferflux.cli.output import Format, note, print_json, print_table
from inferflux.errors import InferfluxError
from inferflux.models import bundle, manifest
from inferflux.models.anchors import Anchors
from inferflux.models.folder import ModelFolder
from inferflux.models.rules import Rules
from inferflux.models.verification import Verified, verify
from inferflux.paths import Home, private_dir
from inferflux.rpc.client import open_channel, translated_errors
from inferflux.rpc.mtls import Identity
from inferflux.v1 import registry_service_pb2 as pb
from inferflux.v1.registry_service_pb2_grpc import RegistryServiceStub

TIMEOUT_S = 10.0
VERSION_COLUMNS = ("version", "current", "pushed", "digest", "key", "source")
EVENT_COLUMNS = ("at", "action", "version")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NewKey:
    """What `keygen` makes. `root`: issue a certificate below this one; `is_root`: make such a one."""

    name: str
    out: Path | None = None
    root: Path | None = None
    is_root: bool = False


def make_key(wish: NewKey, output: Format) -> None:
    """Make a key pair, a root certificate, or a key with a certificate; workers of this home trust keys and roots."""
    from inferflux.models import signing  # noqa: PLC0415 - only here

    directory, trusted = private_dir(wish.out or private_keys(home())), private_dir(trusted_keys(home()))
    try:
        if wish.root is not None:
            made = [signing.issue(directory, wish.name, wish.root)]
        else:
            make = signing.make_root if wish.is_root else signing.make_key
            public = make(directory, wish.name).with_suffix(".crt" if wish.is_root else ".pub")
            made = [public, trust(public, trusted)] if wish.out is None else [public]
    except FileExistsError as e:
        raise CliError(f"{e.filename} exists: keys are never replaced") from e
    report({"key": str(directory / f"{wish.name}.key"), "public": [str(path) for path in made]}, output)


def trust(public: Path, directory: Path) -> Path:
    """Copy the public half to where this home's workers look for whom they trust."""
    target = directory / public.name
    target.write_bytes(public.read_bytes())
    return target


def sign(wish: Any, output: Format) -> None:
    """Write a folder's manifest and sign everything in it."""
    from inferflux.cli import release  # noqa: PLC0415 - only here

    with friendly():
        report(release.sign(wish), output)


def check(folder: Path, keys: Path | None, output: Format) -> None:
    """Verify a folder as a worker would, but for the registry's rules."""
    with friendly():
        verified, _ = read_verified(folder, keys)
    report(describe(folder, verified), output)


def push(folder: Path, keys: Path | None, output: Format) -> None:
    """Verify a folder and make its version known to the registry."""
    with friendly():
        verified, signature = read_verified(folder, keys)
        if verified.manifest is None:
            raise CliError(f"{folder} has no {manifest.NAME}: sign it with `inferctl registry sign`")
        signed = pb.ModelVersion(
            model=verified.manifest.name,
            version=verified.version,
            weights_digest=verified.weights_digest,
            key_id=verified.key_ids[0],
            source=str(folder.resolve()),
            manifest=(folder / manifest.NAME).read_bytes(),
            signature=signature,
        )
        call(lambda stub: stub.PushVersion(pb.PushVersionRequest(version=signed), timeout=TIMEOUT_S))
    report(describe(folder, verified), output)


def promote(model: str, version: int, output: Format) -> None:
    """Make a pushed version the one that counts."""
    request = pb.PromoteVersionRequest(model=model, version=version)
    with friendly():
        reply = call(lambda stub: stub.PromoteVersion(request, timeout=TIMEOUT_S))
    report({"model": model, "current": version, "floor": reply.floor}, output)


def roll_back(model: str, output: Format) -> None:
    """Make the version count that counted before."""
    request = pb.RollBackVersionRequest(model=model)
    with friendly():
        reply = call(lambda stub: stub.RollBackVersion(request, timeout=TIMEOUT_S))
    report({"model": model, "current": reply.version, "floor": reply.version}, output)


def revoke(key_id: str, output: Format) -> None:
    """End the trust in a key."""
    with friendly():
        call(lambda stub: stub.RevokeSigningKey(pb.RevokeSigningKeyRequest(key_id=key_id), timeout=TIMEOUT_S))
    report({"revoked": key_id}, output)


def show_history(model: str, output: Format) -> None:
    """Print all versions and what was done with them."""
    with friendly():
        history = call(lambda stub: stub.GetHistory(pb.GetHistoryRequest(model=model), timeout=TIMEOUT_S))
    document = to_document(model, history)
    if output is Format.JSON:
        print_json(document)
        return
    print_table(VERSION_COLUMNS, (version_row(v, document["current"]) for v in document["versions"]))
    print_table(EVENT_COLUMNS, ((when(e["at"]), e["action"], e["version"]) for e in document["events"]))


def read_verified(folder: Path, keys: Path | None) -> tuple[Verified, bytes]:
    """Verify a folder; returns the bytes of its signature too. Raises ModelRefused."""
    with ModelFolder.open(folder) as opened:
        verified = verify(opened, Anchors.load(keys or trusted_keys(home())), Rules())
        return verified, opened.read(bundle.NAME, bundle.MAX_BYTES)


def describe(folder: Path, verified: Verified) -> dict[str, Any]:
    """Say what was verified."""
    return {
        "model": verified.manifest.name if verified.manifest else folder.name,
        "version": verified.version,
        "weights_digest": verified.weights_digest,
        "key_id": verified.key_ids[0],
        "files": len(verified.files),
        "licence": verified.manifest.licence if verified.manifest else "",
    }


def to_document(model: str, history: pb.GetHistoryResponse) -> dict[str, Any]:
    """Render a history for programs."""
    versions = [
        {
            "version": v.version,
            "weights_digest": v.weights_digest,
            "key_id": v.key_id,
            "source": v.source,
            "pushed_at": v.pushed_at.seconds,
        }
        for v in history.versions
    ]
    events = [{"at": e.at.seconds, "action": e.action, "version": e.version} for e in history.events]
    return {"model": model, "current": history.current, "floor": history.floor, "versions": versions, "events": events}


def version_row(version: dict[str, Any], current: int) -> tuple[object, ...]:
    """Render one version for people."""
    is_current = "yes" if version["version"] == current else ""
    ids = version["weights_digest"][:12], version["key_id"][:12]
    return version["version"], is_current, when(version["pushed_at"]), *ids, version["source"]


def when(seconds: int) -> str:
    """Render a time for people."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def report(document: dict[str, Any], output: Format) -> None:
    """Say what was done."""
    if output is Format.JSON:
        print_json(document)
        return
    for name, value in document.items():
        note(f"{name}: {', '.join(value) if isinstance(value, list) else value}")


def home() -> Home:
    """The home of this environment."""
    return Home.from_env(os.environ)


def private_keys(home: Home) -> Path:
    """Where `keygen` puts private keys."""
    return home.root / "signing"


def trusted_keys(home: Home) -> Path:
    """Whose signatures this home's workers accept."""
    return Path(os.environ.get("INFERFLUX_MODEL_KEYS_DIR") or home.root / "model-keys")


class friendly:  # noqa: N801 - reads as a statement: `with friendly():`
    """Turns errors of ours inside a `with` block into CliError."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, InferfluxError):
            code = Exit.NOT_RUNNING if error.reason == "UNAVAILABLE" else Exit.FAILED
            raise CliError(error.message, code) from error


def call(method: Callable[[Any], Awaitable[T]]) -> T:
    """Make one call to the registry as the operator. Raises InferfluxError."""

    async def run() -> T:
        identity = Identity.load(home().pki, "operator")
        address = os.environ.get("INFERFLUX_REGISTRY_ADDRESS") or home().socket("registry")
        async with open_channel(address, identity, "registry") as channel:
            with translated_errors():
                return await method(RegistryServiceStub(channel))

    return asyncio.run(run())
