"""Policies as code: Rego in this process, or decided by an OPA server. A decision is whether `deny` holds."""

from __future__ import annotations

import threading
from typing import Any, Protocol

from inferflux.policy.rego import denies, is_denied, load_module


class Code(Protocol):
    """Decides on a JSON input. Raises any exception when it can't tell."""

    async def denies(self, document: dict[str, Any]) -> bool: ...


class RegoCode:
    """One module, with an engine for each thread that asks."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._local = threading.local()

    async def denies(self, document: dict[str, Any]) -> bool:
        if not hasattr(self._local, "engine"):
            self._local.engine = load_module(self._module)
        return denies(self._local.engine, document)


class OpaCode:
    """A document of an OPA server, by its data API. `client`: an httpx.AsyncClient whose base is the server."""

    def __init__(self, client: Any, path: str) -> None:
        self._client = client
        self._path = f"/v1/data/{path}"

    async def denies(self, document: dict[str, Any]) -> bool:
        response = await self._client.post(self._path, json={"input": document})
        response.raise_for_status()
        return is_denied((response.json().get("result") or {}).get("deny"))
