"""The part of the admin API that is about guardrails: a dry run of the rules in force, or of others, on a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from inferflux.errors import Unavailable
from inferflux.policy.document import dump, parse
from inferflux.policy.guardrails import Side
from services.gateway.documents import respond
from services.gateway.guardrails.guard import Guard, Subject
from services.gateway.guardrails.referees import Referees
from services.gateway.guardrails.rules import Guardrails, compile_guardrails
from services.gateway.policy import Policies
from services.gateway.policy_api import read

MAX_TEXT = 256 * 1024


class TrialBody(BaseModel):
    """What POST /v1/admin/guardrails/test takes. `guardrails`: a section to try, instead of the one in force."""

    model_config = ConfigDict(extra="forbid")

    text: Annotated[str, Field(strict=True, max_length=MAX_TEXT)]
    side: Side = Side.INPUT
    model: Annotated[str, Field(strict=True, max_length=256)] = ""
    tenant: Annotated[str, Field(strict=True, max_length=256)] = ""
    guardrails: dict[str, Any] | None = None


class GuardrailsApi:
    """Handlers of the routes."""

    def __init__(self, policies: Callable[[], Policies | None], referees: Referees) -> None:
        self._policies = policies
        self._referees = referees

    def router(self) -> APIRouter:
        """Make the routes."""
        router = APIRouter()
        router.add_api_route("/v1/admin/guardrails/test", self.test, methods=["POST"])
        return router

    async def test(self, request: Request) -> Response:
        body = await read(TrialBody, request)
        subject = Subject("", body.model, body.tenant or request.state.principal.tenant, request.state.principal.key_id)
        rules = self._rules(body)
        trial: dict[str, Any] = {"action": "allow", "text": body.text, "verdicts": [], "unasked": None}
        if rules is not None:
            trial = await Guard(rules, subject, self._referees, is_dry=True).try_on(body.side, body.text)
        return respond({"object": "guardrails.test"} | trial)

    def _rules(self, body: TrialBody) -> Guardrails | None:
        if body.guardrails is not None:
            return compile_guardrails(parse(dump({"guardrails": body.guardrails})).guardrails)
        if (policies := self._policies()) is None:
            raise Unavailable("the gateway has no policy yet", retry_after_s=1)
        return policies.live.guardrails
