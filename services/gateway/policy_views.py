"""Parts of the policy document under addresses of their own: `/v1/admin/{guardrails,rate_limit,budgets}`.

A view holds nothing: reading it reads the document in force, changing it makes a new revision of the whole document.
When two administrators change different parts at once, the second change is made again on top of the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from inferflux.errors import Conflict
from inferflux.policy.document import canonical, dump
from services.gateway.documents import respond
from services.gateway.policy_api import OWN_WRITES_S, Number, Reached, author, read
from services.gateway.policy_documents import PolicyChange, PolicyDocuments, PolicyRevision

VIEWS = {"guardrails": ("guardrails",), "rate_limit": ("limits", "rate_limit"), "budgets": ("limits", "budgets")}
"""Name to place in the document."""
MAX_ATTEMPTS = 5
Document = dict[str, Any]


class ViewBody(BaseModel):
    """What PUT takes. `expected_revision`: fail rather than build on another newest revision."""

    model_config = ConfigDict(extra="forbid", strict=True)

    value: Document
    reason: Annotated[str, Field(max_length=512)] = ""
    expected_revision: Number | None = None


class PolicyViews:
    """Handlers of the routes. `reached` waits until this gateway uses a policy revision."""

    def __init__(self, documents: PolicyDocuments, reached: Reached) -> None:
        self._documents = documents
        self._reached = reached

    def router(self) -> APIRouter:
        """Make the routes."""
        router = APIRouter()
        for name in VIEWS:
            self._add(router, name)
        return router

    def _add(self, router: APIRouter, name: str) -> None:
        place, path = VIEWS[name], f"/v1/admin/{name}"

        async def get() -> Response:
            state = await self._documents.get()
            value = look_up(orjson.loads(state.live.document), place)
            return respond({"object": name, "value": value, "revision": state.live.revision, "newest": state.newest})

        async def put(request: Request) -> Response:
            body = await read(ViewBody, request)
            reason = body.reason or f"set {name}"
            made = await self._change(
                author(request), reason, body.expected_revision, lambda old: put_in(old, place, body.value)
            )
            return respond({"object": name, "value": body.value, "revision": made.revision})

        async def delete(request: Request) -> Response:
            made = await self._change(author(request), f"delete {name}", None, lambda old: take_out(old, place))
            return respond({"object": name, "value": None, "revision": made.revision})

        for method, handler in (("GET", get), ("PUT", put), ("DELETE", delete)):
            router.add_api_route(path, handler, methods=[method])

    async def _change(
        self, who: str, reason: str, expected: int | None, edit: Callable[[Document], Document]
    ) -> PolicyRevision:
        """Edit the document in force; again when somebody else was faster. Raises Conflict and PolicyInvalid."""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            state = await self._documents.get()
            if state.candidate is not None:
                raise Conflict(f"revision {state.newest} is being tried: promote it or roll back first")
            document = canonical(dump(edit(orjson.loads(state.live.document))))
            change = PolicyChange(document, who, reason, state.newest if expected is None else expected)
            try:
                made = await self._documents.apply(change)
            except Conflict:
                if expected is not None or attempt == MAX_ATTEMPTS:
                    raise
            else:
                await self._reached(made.revision, OWN_WRITES_S)
                return made
        raise AssertionError("unreachable")


def look_up(document: Document, place: tuple[str, ...]) -> Any:
    """Return what is at a place; None: nothing."""
    for name in place:
        document = (document or {}).get(name)  # type: ignore[assignment]  # None at the end
    return document


def put_in(document: Document, place: tuple[str, ...], value: Document) -> Document:
    """Return the document with a value at a place."""
    first, *rest = place
    inner = put_in(document.get(first) or {}, tuple(rest), value) if rest else value
    return {**document, first: inner}


def take_out(document: Document, place: tuple[str, ...]) -> Document:
    """Return the document with nothing at a place, nor around it if that was all."""
    first, *rest = place
    inner = take_out(document.get(first) or {}, tuple(rest)) if rest else None
    others = {name: value for name, value in document.items() if name != first}
    return {**others, first: inner} if inner else others
