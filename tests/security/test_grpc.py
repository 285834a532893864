"""Every gRPC method, with the certificate of every role: who may not call it is told so, whatever the request."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from inferflux.paths import Home
from inferflux.pki import ensure_pki
from inferflux.rpc.client import open_channel
from inferflux.rpc.mtls import ROLES, Identity
from inferflux.v1 import (
    decode_service_pb2,
    limits_service_pb2,
    policy_service_pb2,
    prefill_service_pb2,
    registry_service_pb2,
    worker_admin_service_pb2,
)

FILES = (
    decode_service_pb2,
    limits_service_pb2,
    policy_service_pb2,
    prefill_service_pb2,
    registry_service_pb2,
    worker_admin_service_pb2,
)
# Written down anew, as the protos say it. First the process, then who may call a service, then the exceptions.
SERVICES = {
    "PolicyService": (
        "policy",
        {"operator", "gateway"},
        {name: {"gateway"} for name in ("WatchSnapshot", "ReportPolicy", "AppendAudit")},
    ),
    "LimitsService": ("policy", {"gateway"}, {"GetUsage": {"gateway", "operator"}}),
    "RegistryService": (
        "registry",
        {"operator", "gateway"},
        {
            "RegisterWorker": {"prefill", "decode", "pooling"},
            "DeregisterWorker": {"prefill", "decode", "pooling"},
            "WatchSnapshot": {"gateway"},
            **{name: {"operator"} for name in ("PushVersion", "PromoteVersion", "RollBackVersion", "GetHistory")},
            "RevokeSigningKey": {"operator"},
            "GetModelRules": {"prefill", "decode", "pooling", "operator"},
        },
    ),
    "PrefillService": (
        "prefill-0",
        {"gateway"},
        {"Claim": {"decode"}, "Commit": {"decode"}, "Handshake": {"decode"}},
    ),
    "DecodeService": ("decode-0", {"gateway"}, {}),
    "WorkerAdminService": ("decode-0", {"operator", "registry", "gateway"}, {}),
}


def forbidden() -> Iterator[tuple[str, str, str, str]]:
    """Name process, role and method of each call that must be refused."""
    for file in FILES:
        for service in file.DESCRIPTOR.services_by_name.values():
            process, allowed, exceptions = SERVICES[service.name]
            for method in service.methods:
                for role in sorted(set(ROLES) - exceptions.get(method.name, allowed)):
                    yield process, role, service.full_name, method.name


CALLS = list(forbidden())


async def call(address: str, identity: Identity, server: str, method: str) -> grpc.StatusCode:
    """Call a method with an empty message, of whatever shape it is; gives the status.

    A refusal may come before the message is written; the client then knows no better than INTERNAL, and asks again.
    """
    for _ in range(10):
        if (code := await _call(address, identity, server, method)) is not grpc.StatusCode.INTERNAL:
            return code
    return grpc.StatusCode.INTERNAL


async def _call(address: str, identity: Identity, server: str, method: str) -> grpc.StatusCode:
    async with open_channel(address, identity, server) as channel:
        stream = channel.stream_stream(method)(iter([b""]), timeout=10)
        try:
            async for _ in stream:
                break
        except grpc.aio.AioRpcError as e:
            return e.code()
        finally:
            stream.cancel()
    return grpc.StatusCode.OK


def test_roles_call_what_they_may_and_nothing_else(site):
    """Each combination that is not allowed, of all services."""
    home = Home(site.cluster.home)
    wrong = []
    for process, role, service, method in CALLS:
        identity = Identity.load(home.pki, role)
        server = process.split("-")[0]
        code = asyncio.run(call(home.socket(process), identity, server, f"/{service}/{method}"))
        if code is not grpc.StatusCode.PERMISSION_DENIED:
            wrong.append((role, service, method, code))

    assert wrong == []
    assert len(CALLS) > 80


@pytest.mark.parametrize(
    "method", ["/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "/grpc.health.v1.Health/Check", "/x/y"]
)
@pytest.mark.parametrize("process", ["policy", "registry", "prefill-0", "decode-0"])
def test_nothing_else_answers(site, process, method):
    """No reflection, no health for everybody, not for the operator either."""
    home = Home(site.cluster.home)
    identity = Identity.load(home.pki, "operator")
    code = asyncio.run(call(home.socket(process), identity, process.split("-")[0], method))

    assert code in {grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED}


def test_a_certificate_of_another_authority_opens_nothing(site, tmp_path):
    """Though it says the same name."""
    home = Home(site.cluster.home)
    ensure_pki(tmp_path / "pki")
    own, strange = (Identity.load(place, "gateway") for place in (home.pki, tmp_path / "pki"))
    assert own != strange
    for process in ("policy", "registry", "prefill-0", "decode-0"):
        method = "/inferflux.v1.PolicyService/ListKeys"
        code = asyncio.run(call(home.socket(process), strange, process.split("-")[0], method))
        assert code is grpc.StatusCode.UNAVAILABLE  # there is no connection that could say more


@pytest.mark.parametrize("process", ["policy", "registry", "prefill-0", "decode-0"])
def test_without_a_certificate_there_is_no_conversation(site, process):
    """Neither in the clear nor by TLS of one side."""
    path = Home(site.cluster.home).socket(process).removeprefix("unix:")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(path)
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
        assert _is_refused(connection)
    context = ssl.create_default_context(cafile=str(Path(Home(site.cluster.home).pki) / "ca.crt"))
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(path)
        try:
            with context.wrap_socket(connection) as tls:
                tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
                assert _is_refused(tls)
        except (ssl.SSLError, ConnectionError):
            pass


def _is_refused(connection: socket.socket) -> bool:
    """Whether the other side hangs up, with nothing said or an alert."""
    try:
        return len(connection.recv(1 << 16)) < 9 or connection.recv(1 << 16) == b""
    except (ConnectionError, ssl.SSLError):
        return True
