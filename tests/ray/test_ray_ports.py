"""Nobody gets anything out of a Ray cluster's ports without its token: Ray runs what it is sent."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress

import grpc
import httpx
import psutil
import pytest

from tests.support.ray_nodes import RayCluster

pytestmark = pytest.mark.timeout(300)

TIMEOUT_S = 3.0
# One harmless method of each service that any of its processes may offer.
METHODS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.autoscaler.AutoscalerStateService/GetClusterResourceState",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.CoreWorkerService/KillActor",
    "/ray.rpc.ReporterService/GetTraceback",
    "/ray.rpc.RayletDriver/ClusterInfo",
)
PATHS = ("/", "/metrics", "/api/version", "/api/jobs/", "/nodes", "/get_or_create_runtime_env")
CLOSED = (8265, 44217)
# It is no gRPC port, it has no such method, or it asks who calls.
REFUSALS = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
OK = grpc.StatusCode.OK


def listeners(token: str) -> dict[tuple[str, int], str]:
    """Where the cluster's processes listen, and which does."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("RAY_AUTH_TOKEN") == token:
                for port in process.net_connections("tcp"):
                    if port.status == psutil.CONN_LISTEN:
                        found[_reachable(port.laddr.ip), port.laddr.port] = " ".join(process.cmdline())[:120]
    return found


def _reachable(ip: str) -> str:
    address = ipaddress.ip_address(ip)
    if address.is_unspecified:
        return "127.0.0.1"
    return str(getattr(address, "ipv4_mapped", None) or address)


def call(address: tuple[str, int], method: str, token: str | None) -> grpc.StatusCode:
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel("{}:{}".format(*address), [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(method)(b"", metadata=metadata, timeout=TIMEOUT_S)
        except grpc.RpcError as e:
            return e.code()
    return OK


def get(address: tuple[str, int], path: str) -> int:
    """The status; 0: it speaks no HTTP."""
    try:
        with httpx.Client(trust_env=False, timeout=TIMEOUT_S) as client:
            return client.get("http://{}:{}{}".format(*address, path)).status_code
    except httpx.HTTPError:
        return 0


def test_each_port_asks_for_the_token(ray_nodes: RayCluster) -> None:
    """All ports of all processes, over gRPC and HTTP; with the token the head answers."""
    token = ray_nodes.environ["RAY_AUTH_TOKEN"]
    found = listeners(token)
    host, _, port = ray_nodes.address.rpartition(":")
    head = (host, int(port))

    assert head in found
    assert call(head, METHODS[0], token) is OK
    assert call(head, METHODS[0], None) is grpc.StatusCode.UNAUTHENTICATED
    assert call(head, METHODS[0], "0" * 64) is grpc.StatusCode.UNAUTHENTICATED
    for address, process in found.items():
        for method in METHODS:
            assert call(address, method, None) in REFUSALS, (address, method, process)
        for path in PATHS:
            assert get(address, path) in {0, 401, 404, 405}, (address, path, process)


def test_nothing_listens_that_engines_have_no_use_for(ray_nodes: RayCluster) -> None:
    """No dashboard and no exporter of metrics. What serves remote clients is always there and asks for the token."""
    ports = {port for _, port in listeners(ray_nodes.environ["RAY_AUTH_TOKEN"])}

    assert ports
    assert ports.isdisjoint(CLOSED)
    for port in CLOSED:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
