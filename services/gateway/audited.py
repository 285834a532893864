"""What is written down of requests: every refusal, a share of the others, and every action of administrators.

A prompt is written down as its hash under a key of the cluster, so that two records can be compared, and a text that
somebody has can be looked for, but nobody can guess short ones; with `debug_mode` as it came.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from typing import Any

from fastapi import Request

from services.gateway.account import Account
from services.gateway.asgi import AsgiScope
from services.gateway.auditor import Auditor
from services.gateway.auth import Principal

ADMIN = "/v1/admin/"
READS = frozenset({"GET", "HEAD"})
REFUSED = frozenset({401, 403, 429})
MAX_PROMPT_BYTES = 256 * 1024
MAX_PATH = 512
_SCALE = 1 << 64


class Audit:
    """Decides what becomes a record, and makes it. `key`: of prompt hashes."""

    def __init__(self, auditor: Auditor, key: bytes) -> None:
        self._auditor = auditor
        self._key = key

    def ended(self, account: Account, *, is_gone: bool) -> None:
        """Take an inference request that has ended."""
        error = account.error
        is_refused = error is not None and error.http_status < 500 and not is_gone
        if is_refused or self._is_sampled(account):
            self._auditor.note(self._request("refusal" if is_refused else "request", account, is_gone=is_gone))

    async def intend(self, request: Request) -> None:
        """Write down what an administrator is about to change. Raises AuditUnavailable."""
        if request.method not in READS:
            record = _action(request.scope, request.state.principal)
            await self._auditor.commit(record | {"kind": "admin", "phase": "intent"})

    def answered(self, scope: AsgiScope, status: int, request_id: str) -> None:
        """Take the answer of any other route."""
        is_admin = scope["path"].startswith(ADMIN)
        if is_admin or status in REFUSED:
            kind = "refusal" if status in REFUSED else "admin"
            record = _action(scope, scope.get("state", {}).get("principal"))
            self._auditor.note(record | {"kind": kind, "phase": "done", "status": status, "request_id": request_id})

    def _is_sampled(self, account: Account) -> bool:
        section = account.policy.audit if account.policy is not None else None
        if section is None or not section.sample:
            return False
        digest = hashlib.blake2b(account.request_id.encode(), digest_size=8).digest()
        return int.from_bytes(digest) / _SCALE < section.sample

    def _request(self, kind: str, account: Account, *, is_gone: bool) -> dict[str, Any]:
        record = account.record(is_gone=is_gone) | {"kind": kind}
        if account.policy is not None:
            record["policy_revision"] = account.policy.revision
        if account.body:
            record |= self._prompt(account)
        return record

    def _prompt(self, account: Account) -> dict[str, Any]:
        section = account.policy.audit if account.policy is not None else None
        if section is not None and section.debug_mode:
            return {"prompt": account.body[:MAX_PROMPT_BYTES].decode("utf-8", "replace")}
        return {"prompt_hash": hmac.digest(self._key, account.body, hashlib.sha256).hex()}


def _action(scope: Mapping[str, Any], principal: Principal | None) -> dict[str, Any]:
    """Describe a request of the administration, without its body: it may hold a secret."""
    record = {"method": scope["method"], "path": scope["path"][:MAX_PATH]}
    if principal is not None:
        record |= {"actor": principal.key_id, "tenant": principal.tenant}
    return record
