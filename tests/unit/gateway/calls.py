"""Calls for tests that need nothing of them but who they are."""

from __future__ import annotations

from inferflux.v1 import types_pb2
from services.gateway.auth import Principal
from services.gateway.call import Call
from services.gateway.endpoints import ENDPOINTS

PATH = "/v1/chat/completions"


def new_call(body: bytes = b"{}", tenant: str = "default", num_events: int = 0) -> Call:
    http = types_pb2.HttpCall(method="POST", path=PATH, body=body)
    call = Call("req_1", ENDPOINTS[PATH], Principal("key_1", tenant, frozenset()), "tiny", http, 0.0, 60.0)
    call.journal.num_events = num_events
    return call
