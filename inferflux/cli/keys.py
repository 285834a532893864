"""`inferctl admin api-keys`: over HTTP with an admin key, or --local over gRPC with the operator's certificate."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
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
    """Where keys are managed. Documents have id, name, tenant, scopes, created_at, expires_at; a new one its secret."""

    def list(self) -> list[Document]: ...
    def create(self, name: str, scopes: Sequence[str], tenant: str, expires_at: int | None) -> Document: ...
    def revoke(self, key_id: str) -> None: ...


class HttpKeys:
    """Through the gateway, as any administrator."""

    def list(self) -> list[Document]:
        with Api() as api:
            keys: list[Document] = api.get(PATH)["data"]
            return keys

    def create(self, name: str, scopes: Sequence[str], tenant: str, expires_at: int | None) -> Document:
        body: Document = {"name": name, "scopes": list(scopes)}
        body |= {"tenant": tenant} if tenant else {}
        body |= {"expires_at": expires_at} if expires_at else {}
        with Api() as api:
            key: Document = api.post(PATH, body)
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

    def create(self, name: str, scopes: Sequence[str], tenant: str, expires_at: int | None) -> Document:
        from inferflux.cli import operator  # noqa: PLC0415

        return operator.create_key(self._home, name, scopes, tenant, expires_at)

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
    columns = ("id", "name", "tenant", "scopes", "created", "expires")
    print_table(columns, (row(d) for d in documents))


def create(keys: Keys, name: str, scopes: Sequence[str], tenant: str, days: float | None, output: Format) -> None:
    """Create a key and print its secret, this once; in the table form alone on stdout, for `export KEY=$(...)`."""
    expires_at = int(time.time() + days * 86400) if days else None
    document = translate(lambda: keys.create(name, scopes, tenant, expires_at))
    if output is Format.JSON:
        print_json(document)
        return
    note(f"created {document['id']} ({', '.join(document['scopes'])}); its secret is shown only now:")
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
    scopes = ", ".join(document["scopes"])
    created, expires = when(document.get("created_at")), when(document.get("expires_at")) or "never"
    return document["id"], document["name"], document["tenant"], scopes, created, expires


def when(epoch_s: int | None) -> str:
    """Render an instant; empty for none."""
    return datetime.fromtimestamp(epoch_s, UTC).strftime("%Y-%m-%d %H:%M") if epoch_s else ""
