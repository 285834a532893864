"""Real gRPC over real mTLS: who may call what, and what a caller learns of a failure."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from inferflux import errors, pki
from inferflux.errors import InferfluxError
from inferflux.rpc.client import open_channel, to_error, translated_errors
from inferflux.rpc.mtls import Identity
from inferflux.rpc.options import MAX_MESSAGE_BYTES
from inferflux.rpc.server import MAX_DETAILS, RpcServer
from inferflux.telemetry import metrics

SECRET = "the secret prompt"
SHAPES = ("UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream", "UnaryWrite")
CALLERS = {"/test.Echo/": frozenset({"gateway"}), "/test.Echo/OperatorOnly": frozenset({"operator"})}
TIMEOUT_S = 20.0


@dataclass
class Echo:
    """A service in all shapes, on plain bytes. A request of the form `raise:<name>` makes the handler fail."""

    closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def one(self, request: bytes, _context: object) -> bytes:
        _maybe_fail(request)
        return request

    async def yielding(self, request: bytes, _context: object) -> AsyncIterator[bytes]:
        try:
            yield request
            _maybe_fail(request)
            if request == b"forever":
                await asyncio.Event().wait()
            while request == b"flood":
                yield request * 1000
        finally:
            self.closed.set()

    async def writing(self, request: bytes, context: Any) -> None:
        await context.write(request)
        _maybe_fail(request)

    async def joining(self, requests: AsyncIterator[bytes], _context: object) -> bytes:
        received = [request async for request in requests]
        _maybe_fail(received[-1])
        return b",".join(received)

    async def conversing(self, requests: AsyncIterator[bytes], _context: object) -> AsyncIterator[bytes]:
        async for request in requests:
            _maybe_fail(request)
            yield request

    async def aborting(self, _request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.OUT_OF_RANGE, "chosen by the handler")
        return b""

    def handler(self) -> Any:
        """Build the generic handler of /test.Echo/."""
        return grpc.method_handlers_generic_handler(
            "test.Echo",
            {
                "UnaryUnary": grpc.unary_unary_rpc_method_handler(self.one),
                "UnaryStream": grpc.unary_stream_rpc_method_handler(self.yielding),
                "UnaryWrite": grpc.unary_stream_rpc_method_handler(self.writing),
                "StreamUnary": grpc.stream_unary_rpc_method_handler(self.joining),
                "StreamStream": grpc.stream_stream_rpc_method_handler(self.conversing),
                "OperatorOnly": grpc.unary_unary_rpc_method_handler(self.one),
                "Aborting": grpc.unary_unary_rpc_method_handler(self.aborting),
            },
        )

    def hidden_handler(self) -> Any:
        """Build a service that nobody was allowed to call."""
        return grpc.method_handlers_generic_handler(
            "test.Hidden", {"UnaryUnary": grpc.unary_unary_rpc_method_handler(self.one)}
        )


def _maybe_fail(request: bytes) -> None:
    command, _, name = request.decode().partition(":")
    if command != "raise":
        return
    kind = getattr(errors, name, None)
    raise kind("slot 3 is stale", retry_after_s=1.5, param="model") if kind else ValueError(SECRET)


@pytest.fixture(scope="module", autouse=True)
def poller() -> Iterator[None]:
    """Keep gRPC's one poller for all tests here: its socket pair comes and goes with the last of its objects."""
    grpc.aio.init_grpc_aio()
    yield
    grpc.aio.shutdown_grpc_aio()


@pytest.fixture(scope="module")
def pki_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pki")
    pki.ensure_pki(directory)
    return directory


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture(params=["unix", "tcp"])
async def address(request: pytest.FixtureRequest, pki_dir: Path, tmp_path: Path, echo: Echo) -> AsyncIterator[str]:
    wanted = f"unix:{tmp_path}/rpc.sock" if request.param == "unix" else "127.0.0.1:0"
    server = RpcServer(Identity.load(pki_dir, "policy"), wanted, CALLERS)
    server.grpc.add_generic_rpc_handlers((echo.handler(), echo.hidden_handler()))
    yield await server.start()
    await server.stop(0)
    await server.stop(0)


Open = Callable[..., grpc.aio.Channel]


@pytest.fixture
async def channel_as(address: str, pki_dir: Path) -> AsyncIterator[Open]:
    """Open channels to the server in some role; all are closed at the end."""
    channels: list[grpc.aio.Channel] = []

    def open_as(role: str, *, server_role: str = "policy", directory: Path = pki_dir) -> grpc.aio.Channel:
        channels.append(open_channel(address, Identity.load(directory, role), server_role))
        return channels[-1]

    yield open_as
    while channels:
        await channels.pop().close()


async def call(channel: grpc.aio.Channel, shape: str, *requests: bytes) -> list[bytes]:
    """Make one call of any shape; returns all responses."""
    method = f"/test.Echo/{shape}"

    async def stream() -> AsyncIterator[bytes]:
        for request in requests:
            yield request

    if shape in {"UnaryStream", "UnaryWrite"}:
        return [response async for response in channel.unary_stream(method)(requests[0], timeout=TIMEOUT_S)]
    if shape == "StreamUnary":
        return [await channel.stream_unary(method)(stream(), timeout=TIMEOUT_S)]
    if shape == "StreamStream":
        return [response async for response in channel.stream_stream(method)(stream(), timeout=TIMEOUT_S)]
    return [await channel.unary_unary(method)(requests[0], timeout=TIMEOUT_S)]


async def failure(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value


@pytest.mark.parametrize("shape", SHAPES)
async def test_allowed_role_passes(channel_as: Open, shape: str) -> None:
    """A role named for the service gets its answer, in every shape."""
    assert await call(channel_as("gateway"), shape, b"hello") == [b"hello"]


@pytest.mark.parametrize("shape", SHAPES)
async def test_other_role_is_denied(channel_as: Open, shape: str) -> None:
    """A valid certificate of another role is not enough."""
    # A stream is refused before its first message, and grpc.aio may not tell why to who is writing at that moment.
    requests = () if shape.startswith("Stream") else (b"hello",)
    error = await failure(call(channel_as("decode"), shape, *requests))

    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert isinstance(to_error(error), errors.PermissionDenied)
    assert to_error(error).message == f"role decode may not call /test.Echo/{shape}"


async def test_method_entry_wins_over_its_service(channel_as: Open) -> None:
    """A method with callers of its own refuses those of its service."""
    assert await call(channel_as("operator"), "OperatorOnly", b"x") == [b"x"]
    error = await failure(call(channel_as("gateway"), "OperatorOnly", b"x"))
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_service_without_callers_is_closed(channel_as: Open) -> None:
    """Nobody was named, so nobody may call; an unknown method does not exist."""
    hidden = channel_as("gateway").unary_unary("/test.Hidden/UnaryUnary")
    error = await failure(hidden(b"x", timeout=TIMEOUT_S))
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED

    error = await failure(call(channel_as("gateway"), "Unknown", b"x"))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert type(to_error(error)) is errors.Internal


async def test_caller_without_certificate_is_refused(address: str, pki_dir: Path) -> None:
    """The handshake fails when the caller shows no certificate."""
    credentials = grpc.ssl_channel_credentials((pki_dir / "ca.crt").read_bytes())
    options = (("grpc.ssl_target_name_override", "policy.inferflux.internal"),)
    async with grpc.aio.secure_channel(address, credentials, options) as channel:
        error = await failure(call(channel, "UnaryUnary", b"x"))

    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert isinstance(to_error(error), errors.Unavailable)


async def test_plain_text_caller_is_refused(address: str) -> None:
    """There is no way in without TLS."""
    async with grpc.aio.insecure_channel(address) as channel:
        error = await failure(call(channel, "UnaryUnary", b"x"))

    assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_other_ca_is_refused_by_both_sides(address: str, channel_as: Open, pki_dir: Path, tmp_path: Path) -> None:
    """A certificate of a foreign CA with the right names opens nothing, and a foreign server is not trusted."""
    foreign = tmp_path / "foreign"
    pki.ensure_pki(foreign, ["gateway"])
    error = await failure(call(channel_as("gateway", directory=foreign), "UnaryUnary", b"x"))
    assert error.code() is grpc.StatusCode.UNAVAILABLE

    theirs = Identity.load(foreign, "gateway")
    trusting = Identity("gateway", (pki_dir / "ca.crt").read_bytes(), theirs.certificate, theirs.key)
    async with open_channel(address, trusting, "policy") as channel:
        error = await failure(call(channel, "UnaryUnary", b"x"))
    assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_server_of_another_role_is_not_accepted(channel_as: Open) -> None:
    """A client that wants the registry does not talk to the policy service."""
    error = await failure(call(channel_as("gateway", server_role="registry"), "UnaryUnary", b"x"))

    assert error.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("shape", SHAPES)
async def test_unexpected_exception_leaks_nothing(
    channel_as: Open, caplog: pytest.LogCaptureFixture, shape: str
) -> None:
    """The caller learns INTERNAL and no more; our log names the method."""
    with caplog.at_level(logging.ERROR, "inferflux"):
        error = await failure(call(channel_as("gateway"), shape, b"raise:ValueError"))

    assert error.code() is grpc.StatusCode.INTERNAL
    assert error.details() == "internal error"
    assert SECRET not in repr(error)
    assert SECRET not in str(list(error.trailing_metadata() or ()))
    assert [record.method for record in caplog.records if record.msg == "handler failed"] == [f"/test.Echo/{shape}"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [errors.NoWorker, errors.KvStale, errors.ModelNotFound, errors.BodyTooLarge])
async def test_our_errors_survive_the_round_trip(channel_as: Open, shape: str, kind: type[InferfluxError]) -> None:
    """Class, message, parameter and retry time arrive as they were raised."""
    error = await failure(call(channel_as("gateway"), shape, b"raise:" + kind.__name__.encode()))

    rebuilt = to_error(error)
    assert error.code() is kind.grpc_code
    assert type(rebuilt) is kind
    assert (rebuilt.message, rebuilt.retry_after_s, rebuilt.param) == ("slot 3 is stale", 1.5, "model")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.CANCELLED, errors.Unavailable),
        (grpc.StatusCode.INTERNAL, errors.Unavailable),
        (grpc.StatusCode.UNKNOWN, errors.Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.PERMISSION_DENIED, errors.PermissionDenied),
        (grpc.StatusCode.UNAUTHENTICATED, errors.Unauthenticated),
        (grpc.StatusCode.UNIMPLEMENTED, errors.Internal),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.Internal),
    ],
)
@pytest.mark.parametrize("trailers", [grpc.aio.Metadata(), grpc.aio.Metadata(("inferflux-reason", "FROM_THE_FUTURE"))])
def test_failures_of_the_transport_keep_their_text(
    code: grpc.StatusCode, kind: type[InferfluxError], trailers: grpc.aio.Metadata
) -> None:
    """Without a reason that we know, the code decides the class, and no address or path gets into the message."""
    rebuilt = to_error(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailers, "unix:/secret/path"))

    assert type(rebuilt) is kind
    assert "secret" not in rebuilt.message


def test_every_reason_names_one_class() -> None:
    """No two classes of the tree share a reason, else one could not be rebuilt."""

    def tree(kind: type[InferfluxError]) -> list[type[InferfluxError]]:
        return [kind, *(each for child in kind.__subclasses__() for each in tree(child))]

    reasons = [kind.reason for kind in tree(InferfluxError) if kind.__module__ == errors.__name__]
    assert sorted(set(reasons)) == sorted(reasons[1:])


async def test_messages_before_the_failure_arrive(channel_as: Open) -> None:
    """A stream that fails late delivers what it sent before."""
    stream = channel_as("gateway").unary_stream("/test.Echo/UnaryStream")(b"raise:Draining", timeout=TIMEOUT_S)

    assert await stream.read() == b"raise:Draining"
    with pytest.raises(errors.Draining), translated_errors():
        await stream.read()


async def test_long_messages_are_cut(pki_dir: Path, tmp_path: Path) -> None:
    """A message that would not fit into the trailers is shortened instead of killing the connection."""

    async def fail(_request: bytes, _context: object) -> bytes:
        raise errors.InvalidRequest("é" * 100_000, param="p" * 100_000)

    handler = grpc.unary_unary_rpc_method_handler(fail)
    server = RpcServer(Identity.load(pki_dir, "policy"), f"unix:{tmp_path}/rpc.sock", CALLERS)
    server.grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", {"UnaryUnary": handler}),))
    address = await server.start()
    async with open_channel(address, Identity.load(pki_dir, "gateway"), "policy") as channel:
        error = to_error(await failure(call(channel, "UnaryUnary", b"x")))
    await server.stop(0)

    assert type(error) is errors.InvalidRequest
    assert error.message == "é" * MAX_DETAILS


async def test_handlers_may_choose_their_own_status(channel_as: Open) -> None:
    """An explicit abort of a handler is not covered up."""
    error = await failure(call(channel_as("gateway"), "Aborting", b"x"))

    assert (error.code(), error.details()) == (grpc.StatusCode.OUT_OF_RANGE, "chosen by the handler")


@pytest.mark.parametrize("request_bytes", [b"forever", b"flood"])
async def test_cancelled_call_closes_the_handler(channel_as: Open, echo: Echo, request_bytes: bytes) -> None:
    """A caller that goes away ends the handler's generator at once, waiting or in the middle of a write."""
    stream = channel_as("gateway").unary_stream("/test.Echo/UnaryStream")(request_bytes)
    assert await stream.read() == request_bytes

    stream.cancel()

    await asyncio.wait_for(echo.closed.wait(), TIMEOUT_S)


async def test_calls_are_counted_by_method_and_code(channel_as: Open) -> None:
    """Each call is one observation under its method and final status."""

    def count(code: str) -> float:
        labels = {"method": "/test.Echo/UnaryUnary", "code": code}
        return metrics.REGISTRY.get_sample_value("inferflux_rpc_seconds_count", labels) or 0.0

    before = {code: count(code) for code in ("OK", "NOT_FOUND", "INTERNAL", "PERMISSION_DENIED")}
    channel = channel_as("gateway")
    await call(channel, "UnaryUnary", b"x")
    await failure(call(channel, "UnaryUnary", b"raise:NotFound"))
    await failure(call(channel, "UnaryUnary", b"raise:ValueError"))
    await failure(call(channel_as("decode"), "UnaryUnary", b"x"))

    async with asyncio.timeout(TIMEOUT_S):  # the caller may hear of a call's end before its server has counted it
        while {code: count(code) - before[code] for code in before} != dict.fromkeys(before, 1.0):
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.OK])
async def test_the_end_of_a_call_does_not_hide_that_its_task_was_cancelled(code: grpc.StatusCode) -> None:
    """Else loops that call again would go on for ever: grpc.aio lets a status that is there already win."""

    async def lost() -> None:
        with translated_errors():
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            if code is not grpc.StatusCode.OK:
                raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata())

    task = asyncio.ensure_future(lost())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])

    assert task.cancelled()


async def test_large_messages_fit(channel_as: Open) -> None:
    """Much more than gRPC's own 4 MiB may travel, up to our limit."""
    channel = channel_as("gateway")
    body = bytes(8 * 1024 * 1024)
    assert await call(channel, "UnaryUnary", body) == [body]

    error = await failure(call(channel, "UnaryUnary", bytes(MAX_MESSAGE_BYTES + 1)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_channel_finds_a_restarted_server_within_a_second_or_so(pki_dir: Path, tmp_path: Path) -> None:
    """A channel that met a dead server works soon after its return, without being opened again."""
    address = f"unix:{tmp_path}/rpc.sock"
    identity = Identity.load(pki_dir, "policy")

    async def start() -> RpcServer:
        server = RpcServer(identity, address, CALLERS)
        server.grpc.add_generic_rpc_handlers((Echo().handler(),))
        await server.start()
        return server

    async with open_channel(address, Identity.load(pki_dir, "gateway"), "policy") as channel:
        first = await start()
        await call(channel, "UnaryUnary", b"x")
        await first.stop(0)
        for _ in range(3):
            with pytest.raises(errors.Unavailable), translated_errors():
                await call(channel, "UnaryUnary", b"x")
        second = await start()
        method = channel.unary_unary("/test.Echo/UnaryUnary")
        assert await method(b"x", timeout=5, wait_for_ready=True) == b"x"
        await second.stop(0)


async def test_server_that_never_started_can_be_stopped(pki_dir: Path) -> None:
    """A process that fails between making its server and starting it ends cleanly."""
    server = RpcServer(Identity.load(pki_dir, "policy"), "127.0.0.1:0", CALLERS)
    await server.stop()
    del server
    gc.collect()


@pytest.mark.parametrize("bad", ["unix:/nonexistent/dir/rpc.sock", "nowhere"])
async def test_unusable_address_is_a_config_error(pki_dir: Path, bad: str) -> None:
    """An address that cannot be listened on is named."""
    server = RpcServer(Identity.load(pki_dir, "policy"), bad, CALLERS)

    with pytest.raises(errors.ConfigError, match=bad):
        await server.start()
    await server.stop(0)


async def test_port_in_use_is_a_config_error(address: str, pki_dir: Path) -> None:
    """A second server does not share a TCP port with the first."""
    if address.startswith("unix:"):
        return
    server = RpcServer(Identity.load(pki_dir, "policy"), address, CALLERS)

    with pytest.raises(errors.ConfigError):
        await server.start()
    await server.stop(0)


async def test_certificates_change_while_the_server_runs(pki_dir: Path, tmp_path: Path) -> None:
    """New files count from the next handshake, on both sides; callers with those of the old CA stay out."""
    directory = tmp_path / "pki"
    shutil.copytree(pki_dir, directory)
    old = Identity.load(directory, "gateway")
    server = RpcServer(Identity.load(directory, "policy"), f"unix:{tmp_path}/rpc.sock", CALLERS)
    server.grpc.add_generic_rpc_handlers((Echo().handler(),))
    address = await server.start()
    try:
        async with open_channel(address, Identity.load(directory, "gateway"), "policy") as channel:
            assert await call(channel, "UnaryUnary", b"x") == [b"x"]
            stream = channel.unary_stream("/test.Echo/UnaryStream")(b"forever")
            assert await stream.read() == b"forever"
            shutil.rmtree(directory)
            pki.ensure_pki(directory)
            async with open_channel(address, replace(old, source=None), "policy") as late:
                assert (await failure(call(late, "UnaryUnary", b"z"))).code() is grpc.StatusCode.UNAVAILABLE
            channel._looked_at = -math.inf
            assert await call(channel, "UnaryUnary", b"y") == [b"y"]
            assert not stream.done()
            stream.cancel()
    finally:
        await server.stop(0)
