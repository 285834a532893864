"""The stream to a decode worker, over real gRPC, broken at the worst moment."""

from __future__ import annotations

import asyncio

from inferflux.clock import SystemClock
from inferflux.rpc.client import open_channel
from inferflux.rpc.mtls import Identity
from inferflux.types import ModelFingerprint, Role, State
from inferflux.v1 import decode_service_pb2 as pb
from inferflux.v1 import types_pb2
from services.gateway.auth import Principal
from services.gateway.call import Call
from services.gateway.endpoints import ENDPOINTS
from services.gateway.heart import Heart
from services.gateway.news import News
from services.gateway.poison import Inquest
from services.gateway.prefill import Tickets
from services.gateway.session import DecodeSession
from services.gateway.views import Worker
from tests.support.fake_cluster import FINGERPRINT, MODEL, FakeCluster, FakeDecode, fake_cluster, until


def connect(cluster: FakeCluster, decode: FakeDecode) -> DecodeSession:
    fingerprint = ModelFingerprint.from_proto(FINGERPRINT)
    worker = Worker(
        "decode-0", decode.incarnation, Role.DECODE, MODEL, decode.address, State.READY, fingerprint, "h", 8
    )
    channel = open_channel(decode.address, Identity.load(cluster.root / "pki", "gateway"), "decode")
    hello = pb.Hello(session_id="s", gateway_id="g")
    inquest = Inquest(SystemClock(), News())
    return DecodeSession(worker, channel, Heart(100), inquest, hello, max_buffered_bytes=1 << 20)


def new_call() -> Call:
    now = asyncio.get_running_loop().time()
    http = types_pb2.HttpCall(method="POST", path="/v1/chat/completions", body=b"{}")
    principal = Principal("key_1", "default", frozenset())
    return Call("req_1", ENDPOINTS[http.path], principal, MODEL, http, now, now + 60)


async def test_a_cancel_that_was_not_sent_is_not_lost():
    """The worker's session outlives the stream, so it would compute for nobody."""

    async def hang(_job):
        await asyncio.sleep(60)

    async with fake_cluster() as cluster:
        decode = await cluster.add_decode()
        decode.script = hang
        session = connect(cluster, decode)
        link = asyncio.ensure_future(session.run())
        try:
            await until(lambda: session.heart.is_up)
            call = new_call()
            with call.span("decode") as span:
                stream = session.start(call, span, Tickets())
            await until(lambda: decode.jobs)
            session.give_up()
            session.close(stream)  # before the writer has its turn
            await until(lambda: len(decode.hellos) == 2)

            await until(lambda: [cancel.handle for cancel in decode.cancels] == [stream.handle], timeout_s=2)
        finally:
            link.cancel()
            await asyncio.gather(link, return_exceptions=True)
