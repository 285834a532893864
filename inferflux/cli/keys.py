"""`inferctl admin api-keys`: over HTTP with an admin key, or --local over gRPC with the operator's certificate."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

from inferflux.cli.api import Api
from inferflux.cli.failure import CliError, Exit
from inferflux.cli.output import Format, note, print_json, print_table
from inferflux.errors import ConfigError, InferfluxError, Unavailable
from inferflux.paths import Home

PATH = "/v1/admin/api_keys"
Document = dict[str, Any]
T = TypeVar("T")


class Keys(Protocol):
    """Where keys are managed. Documents are those of the HTTP API; one of a new secret has it as its `secret`."""

    def list(self) -> list[Document]: ...
    def create(self, wanted: Document) -> Document: ...
    def rotate(self, key_id: str, grace_s: float) -> Document: ...
    def revoke(self, key_id: str) -> None: ...


class HttpKeys:
    """Through the gateway, as any administrator."""

    def list(self) -> list[Document]:
        with Api() as api:
            keys: list[Document] = api.get(PATH)["data"]
            return keys

    def create(self, wanted: Document) -> Document:
        with Api() as api:
            key: Document = api.post(PATH, wanted)
            return key

    def rotate(self, key_id: str, grace_s: float) -> Document:
        with Api() as api:
            key: Document = api.post(f"{PATH}/{quote(key_id, safe='')}/rotate", {"grace_s": grace_s})
            return key

    def revoke(self, key_id: str) -> None:
        with Api() as api:
            api.delete(f"{PATH}/{quote(key_id, safe='')}")


class LocalKeys:
    """Straight to the policy service of this home's cluster, as its operator."""

    def __init__(self) -> None:
        self._home = Home.from_env(os.environ)

    def list(self) -> list[Document]:
        from inferflux.cli import operator  # noqa: PLC0415 - gRPC only when used

        return operator.list_keys(self._home)

    def create(self, wanted: Document) -> Document:
        from inferflux.cli import operator  # noqa: PLC0415

        return operator.create_key(self._home, **wanted)

    def rotate(self, key_id: str, grace_s: float) -> Document:
        from inferflux.cli import operator  # noqa: PLC0415

        return operator.rotate_key(self._home, key_id, grace_s)

    def revoke(self, key_id: str) -> None:
        from inferflux.cli import operator  # noqa: PLC0415

        operator.revoke_key(self._home, key_id)


def open_keys(*, is_local: bool) -> Keys:
    """Choose the way."""
    return LocalKeys() if is_local else HttpKeys()


def show(keys: Keys, output: Format) -> None:
    """List keys."""
    documents = translate(keys.list)
    if output is Format.JSON:
        print_json({"object": "list", "data": documents})
        return
    columns = ("id", "name", "tenant", "team", "scopes", "models", "created", "expires")
    print_table(columns, (row(d) for d in documents))


def create(keys: Keys, wanted: Document, days: float | None, output: Format) -> None:
    """Create a key and print its secret, this once; in the table form alone on stdout, for `export KEY=$(...)`."""
    life = {"expires_at": int(time.time() + days * 86400)} if days else {}
    given = {name: value for name, value in wanted.items() if value}
    document = translate(lambda: keys.create(given | life))
    granted = ", ".join([*document["scopes"], *document["roles"]])
    _show_secret(document, f"created {document['id']} ({granted}); its secret is shown only now:", output)


def rotate(keys: Keys, key_id: str, grace_s: float, output: Format) -> None:
    """Give a key a new secret and print it, as `create` does."""
    document = translate(lambda: keys.rotate(key_id, grace_s))
    old = f"the old one works for another {grace_s:g} s" if grace_s else "the old one is dead"
    _show_secret(document, f"rotated {key_id}; {old}. The new secret is shown only now:", output)


def _show_secret(document: Document, text: str, output: Format) -> None:
    if output is Format.JSON:
        print_json(document)
        return
    note(text)
    sys.stdout.write(document["secret"] + "\n")


def revoke(keys: Keys, key_id: str, output: Format) -> None:
    """Revoke a key."""
    translate(lambda: keys.revoke(key_id))
    if output is Format.JSON:
        print_json({"id": key_id, "revoked": True})
        return
    note(f"revoked {key_id}")


def translate(action: Callable[[], T]) -> T:
    """Do something that may fail in the operator's way."""
    try:
        return action()
    except (ConfigError, Unavailable) as e:  # no certificate yet, or nobody behind the socket
        raise CliError(f"no policy service to ask: {e.message}", Exit.NOT_RUNNING) from e
    except InferfluxError as e:
        raise CliError(e.message) from e


def row(document: Document) -> tuple[str, ...]:
    """Render a key for people."""
    scopes = ", ".join([*document["scopes"], *document["roles"]])
    models = "all" if document["models"] is None else ", ".join(document["models"]) or "none"
    created, expires = when(document.get("created_at")), when(document.get("expires_at")) or "never"
    return document["id"], document["name"], document["tenant"], document["team"], scopes, models, created, expires


def when(epoch_s: int | None) -> str:
    """Render an instant; empty for none."""
    return datetime.fromtimestamp(epoch_s, UTC).strftime("%Y-%m-%d %H:%M") if epoch_s else ""
