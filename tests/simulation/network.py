"""A network that can be slow, cut, or cut in one direction, and the RPCs of grpc.aio over it.

Messages of one direction of one call arrive in order. What is cut is kept and arrives when the cut heals, as TCP does.
A process that dies resets its calls; one that hangs neither hears nor says anything.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc

from inferflux.errors import DeadlineExceeded, InferfluxError, Internal, Unavailable
from inferflux.rpc.server import REASON_KEY

Handlers = Mapping[str, Callable[..., Any]]
MIN_DELAY_S, MAX_DELAY_S = 0.0001, 0.002
UNACKNOWLEDGED_S = 2.5
"""TCP sends ten segments before the first acknowledgement (RFC 6928): as many pulses."""


class Network:
    """Who can talk to whom. `slowness`: factor on all delays."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.slowness = 1.0
        self.servers: dict[str, Server] = {}
        self._cuts: dict[tuple[str, str], float] = {}
        self._frozen: set[str] = set()
        self._pipes: set[Pipe] = set()
        self._dead: set[str] = set()

    def cut(self, source: str, target: str) -> None:
        """Let nothing through from one process to another; soon nothing comes back either, unacknowledged."""
        self._cuts[source, target] = asyncio.get_running_loop().time()

    def freeze(self, name: str) -> None:
        """Stop a process."""
        self._frozen.add(name)

    def slow_down(self) -> None:
        """Let everything take fifty times as long."""
        self.slowness = 50.0

    def heal(self) -> None:
        """Let everything through and everybody go on."""
        self._cuts.clear()
        self._frozen.clear()
        self.slowness = 1.0
        for pipe in sorted(self._pipes, key=lambda pipe: pipe.number):
            pipe.flush()

    def is_frozen(self, name: str) -> bool:
        return name in self._frozen

    def is_held(self, source: str, target: str) -> bool:
        if source in self._frozen or target in self._frozen or (source, target) in self._cuts:
            return True
        cut_at = self._cuts.get((target, source))
        return cut_at is not None and asyncio.get_running_loop().time() - cut_at > UNACKNOWLEDGED_S

    def join(self, pipe: Pipe) -> int:
        """Count a pipe; its number orders what happens at the same time."""
        self._pipes.add(pipe)
        return next(_numbers)

    def bury(self, client: str, rpcs: list[Rpc]) -> None:
        """Let a client be dead: it says nothing any more, and its calls break."""
        self._dead.add(client)
        for rpc in rpcs:
            rpc.hang_up()

    def is_dead(self, name: str) -> bool:
        return name in self._dead

    def delay_s(self) -> float:
        return self.rng.uniform(MIN_DELAY_S, MAX_DELAY_S) * self.slowness


def _count() -> Any:
    number = 0
    while True:
        yield number
        number += 1


_numbers = _count()


class Pipe:
    """One direction of one call."""

    def __init__(self, network: Network, source: str, target: str, deliver: Callable[[Any], None]) -> None:
        self._network = network
        self._ends = source, target
        self._deliver = deliver
        self._last_at = 0.0
        self._held: deque[Any] = deque()
        self.number = network.join(self)

    def send(self, item: Any) -> None:
        if self._network.is_dead(self._ends[0]):
            return
        loop = asyncio.get_running_loop()
        # Never at the same instant: timers of one instant run in any order.
        self._last_at = max(self._last_at + 1e-6, loop.time() + self._network.delay_s())
        loop.call_at(self._last_at, self._arrive, item)

    def _arrive(self, item: Any) -> None:
        if self._held or self._network.is_held(*self._ends):
            self._held.append(item)
        else:
            self._deliver(item)

    def flush(self) -> None:
        while self._held:
            self._deliver(self._held.popleft())


class Server:
    """The listening side of one start of a process. `name`: of the process."""

    def __init__(self, network: Network, name: str, address: str, handlers: Handlers) -> None:
        self.name = name
        self.handlers = handlers
        self.is_alive = True
        self.rpcs: set[Rpc] = set()
        self._network = network
        self._address = address
        network.servers[address] = self

    def kill(self) -> None:
        """Die: the kernel resets all connections."""
        self.is_alive = False
        if self._network.servers.get(self._address) is self:
            del self._network.servers[self._address]
        for rpc in sorted(self.rpcs, key=lambda rpc: rpc.number):
            rpc.reset()


class Rpc:
    """One call of any shape: messages up, messages down, one end."""

    def __init__(self, network: Network, client: str, address: str, path: str, *, is_client_stream: bool) -> None:
        self.inbox: asyncio.Queue[Any] = asyncio.Queue()
        self._requests: asyncio.Queue[Any] = asyncio.Queue()
        self._is_client_stream = is_client_stream
        self._path = path
        self._task: asyncio.Task[None] | None = None
        self._network = network
        self._is_over = False
        self._server = network.servers.get(address)
        name = self._server.name if self._server else address
        self._up = Pipe(network, client, name, self._take_request)
        self._down = Pipe(network, name, client, self.inbox.put_nowait)
        self.number = self._up.number
        if self._server is not None:
            self._server.rpcs.add(self)

    def send(self, kind: str, message: Any = None) -> None:
        """Send a request message, or `cancel`."""
        self._up.send((kind, message))

    def reset(self) -> None:
        """Break the call, as the kernel does for a process that is no more."""
        self._down.send(("end", rpc_error(Unavailable("connection reset"))))
        self._is_over = True
        if self._task is not None:
            self._task.cancel()

    def hang_up(self) -> None:
        """Break the call, as the kernel does for a client that is no more."""
        if self._task is not None:
            self._task.cancel()

    def _take_request(self, item: tuple[str, Any]) -> None:
        kind, message = item
        if self._server is None or not self._server.is_alive:
            if not self._is_over:
                self.reset()
        elif kind == "cancel":
            if self._task is not None:
                self._task.cancel()
        else:
            self._requests.put_nowait(message)
            if self._task is None:
                request = self._iterate() if self._is_client_stream else message
                handler = self._server.handlers[self._path]
                self._task = asyncio.get_running_loop().create_task(self._serve(handler, request))

    async def _iterate(self) -> AsyncIterator[Any]:
        while True:
            yield await self._requests.get()

    async def _serve(self, handler: Callable[..., Any], request: Any) -> None:
        error: Exception | None = None
        try:
            answer = handler(request, None)
            if isinstance(answer, Awaitable):
                self._answer("message", await answer)
            else:
                async for message in answer:
                    self._answer("message", message)
        except asyncio.CancelledError:
            error = rpc_error(Unavailable("cancelled"))
        except InferfluxError as e:
            error = rpc_error(e)
        except Exception as e:  # noqa: BLE001 - as the server's interceptor does
            error = rpc_error(Internal(f"{type(e).__name__} in {self._path}"))
        self._answer("end", error)

    def _answer(self, kind: str, message: Any) -> None:
        if not self._is_over:
            self._down.send((kind, message))


class StreamCall:
    """grpc.aio's StreamStreamCall and UnaryStreamCall."""

    def __init__(self, rpc: Rpc, *requests: Any) -> None:
        self._rpc = rpc
        for request in requests:
            rpc.send("message", request)

    async def write(self, message: Any) -> None:
        self._rpc.send("message", message)

    def cancel(self) -> bool:
        self._rpc.send("cancel")
        self._rpc.inbox.put_nowait(("cancelled", None))
        return True

    def __aiter__(self) -> StreamCall:
        return self

    async def __anext__(self) -> Any:
        kind, item = await self._rpc.inbox.get()
        if kind == "message":
            return item
        if kind == "cancelled":
            raise asyncio.CancelledError
        if item is not None:
            raise item
        raise StopAsyncIteration


class UnaryCall:
    """grpc.aio's UnaryUnaryCall: cancelling it, or whoever awaits it, tells the server."""

    def __init__(self, rpc: Rpc, request: Any, timeout: float | None = None) -> None:
        self._rpc = rpc
        self._timeout_s = timeout
        rpc.send("message", request)
        self._task = asyncio.get_running_loop().create_task(self._run())

    def __await__(self) -> Any:
        return self._task.__await__()

    def cancel(self) -> bool:
        return self._task.cancel()

    async def _run(self) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                kind, item = await self._rpc.inbox.get()
        except asyncio.CancelledError:
            self._rpc.send("cancel")
            raise
        except TimeoutError:
            self._rpc.send("cancel")
            raise rpc_error(DeadlineExceeded("deadline")) from None
        if kind == "message":
            return item
        raise item


class Channel:
    """grpc.aio.Channel from a process to an address."""

    def __init__(self, network: Network, client: str, address: str) -> None:
        self._network = network
        self._client = client
        self._address = address

    def unary_unary(self, path: str, **_: Any) -> Callable[..., UnaryCall]:
        return lambda request, timeout=None: UnaryCall(self._rpc(path), request, timeout)

    def unary_stream(self, path: str, **_: Any) -> Callable[..., StreamCall]:
        return lambda request: StreamCall(self._rpc(path), request)

    def stream_stream(self, path: str, **_: Any) -> Callable[..., StreamCall]:
        return lambda: StreamCall(self._rpc(path, is_client_stream=True))

    async def close(self, grace: float | None = None) -> None:
        """Nothing is open but calls, and these end by themselves."""

    def _rpc(self, path: str, *, is_client_stream: bool = False) -> Rpc:
        return Rpc(self._network, self._client, self._address, path, is_client_stream=is_client_stream)


def rpc_error(error: InferfluxError) -> grpc.aio.AioRpcError:
    """Make what a client sees of a server's error."""
    trailers = grpc.aio.Metadata((REASON_KEY, error.reason))
    return grpc.aio.AioRpcError(error.grpc_code, grpc.aio.Metadata(), trailers, error.message)
