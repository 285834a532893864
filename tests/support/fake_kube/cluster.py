"""The whole cluster: start it with `python -m tests.support.fake_kube --dir DIR`, use it with DIR/kubeconfig."""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import shutil
import signal
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trustme
from aiohttp import web

from tests.support.fake_kube import controllers
from tests.support.fake_kube.api import Api
from tests.support.fake_kube.kubelet import NAME, Kubelet
from tests.support.fake_kube.network import Network
from tests.support.fake_kube.pod import Access, Node
from tests.support.fake_kube.rbac import Guard
from tests.support.fake_kube.store import Store

PORT = 6443
OCTETS = range(64, 127)
"""Second bytes of 127.x.0.0/16 that clusters take; other tests use 127.0.0.0/16."""
NAMESPACES = ("default", "kube-system")


async def serve(directory: Path, image_env: dict[str, str], opened: tuple[Path, ...]) -> None:
    """Run a cluster until a signal, and leave nothing of it but some files in `directory`, which all may read."""
    store, listener, stop = Store(), _listen(), asyncio.Event()
    address = listener.getsockname()[0]
    network = Network(store, int(address.split(".")[1]), directory)
    token = secrets.token_hex(16)
    guard = Guard(store, token)
    access = Access(address, PORT, directory / "ca.crt", guard.issue)
    node = Node(directory / "pods", directory / "claims", image_env, opened, network.hosts_file, access)
    kubelet = Kubelet(store, network, node)
    api = Api(store, guard, network.allocate_service, kubelet.log)
    _populate(store)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with _serving(api, listener, directory, token), _tasks(store, network, kubelet):
        await stop.wait()
    shutil.rmtree(directory / "pods", ignore_errors=True)


def _listen() -> socket.socket:
    """Take the API's address, and with it a network that no other cluster has."""
    for octet in random.sample(OCTETS, len(OCTETS)):
        sock = socket.socket()
        try:
            sock.bind((f"127.{octet}.0.1", PORT))
        except OSError:
            sock.close()
        else:
            return sock
    raise SystemExit(f"no free network among 127.{OCTETS.start}.0.0/16 and its neighbours")


def _populate(store: Store) -> None:
    for name in NAMESPACES:
        store.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NAME, "labels": {"kubernetes.io/os": "linux"}}}
    ready = {"type": "Ready", "status": "True", "reason": "KubeletReady"}
    store.create(node | {"status": {"conditions": [ready], "nodeInfo": {"kubeletVersion": "v1.37.0"}}})


@asynccontextmanager
async def _serving(api: Api, listener: socket.socket, directory: Path, token: str) -> AsyncIterator[None]:
    address = listener.getsockname()[0]
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(address).configure_cert(context)
    ca_file = directory / "ca.crt"
    authority.cert_pem.write_to_path(str(ca_file))
    runner = web.AppRunner(api.application(), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.SockSite(runner, listener, ssl_context=context).start()
    _write_kubeconfig(directory / "kubeconfig", f"https://{address}:{PORT}", ca_file, token)
    try:
        yield
    finally:
        await runner.cleanup()


@asynccontextmanager
async def _tasks(store: Store, network: Network, kubelet: Kubelet) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(run) for run in (controllers.run(store), network.run(), kubelet.run())]
    failed = asyncio.gather(*tasks)
    failed.add_done_callback(lambda done: done.cancelled() or os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield
    finally:
        is_broken = failed.done()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await kubelet.close()
        await network.close()
        await asyncio.gather(failed, return_exceptions=True)
        if is_broken:
            failed.result()


def _write_kubeconfig(path: Path, server: str, ca_file: Path, token: str) -> None:
    cluster = {"name": "fake", "cluster": {"server": server, "certificate-authority": str(ca_file)}}
    user = {"name": "admin", "user": {"token": token}}
    context = {"name": "fake", "context": {"cluster": "fake", "user": "admin", "namespace": "default"}}
    config = {"apiVersion": "v1", "kind": "Config", "current-context": "fake"}
    config |= {"clusters": [cluster], "users": [user], "contexts": [context]}
    temporary = path.with_suffix(".tmp")
    temporary.touch(mode=0o600)
    temporary.write_text(json.dumps(config))
    temporary.replace(path)
