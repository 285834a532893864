"""A gRPC server with our rules: mTLS only, callers allowed by role, errors mapped in one place, every call counted.

Unknown exceptions reach callers as INTERNAL "internal error": their text may quote a prompt.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, cast

import grpc

from inferflux.errors import ConfigError, InferfluxError, Internal, PermissionDenied
from inferflux.rpc.mtls import Identity, caller_role
from inferflux.rpc.options import SERVER_OPTIONS
from inferflux.telemetry import metrics

REASON_KEY, RETRY_AFTER_KEY, PARAM_KEY = "inferflux-reason", "inferflux-retry-after-s", "inferflux-param"
MAX_DETAILS = 1024
"""Characters of an error message that travel; HTTP/2 peers limit all headers together to 8 KiB."""
Callers = Mapping[str, frozenset[str]]
Context = grpc.aio.ServicerContext[Any, Any]
Behavior = Callable[[Any, Context], Any]
_log = logging.getLogger(__name__)


class RpcServer:
    """One listening gRPC server. Create it inside the event loop and after all forks: gRPC starts threads.

    `callers` maps a full method (`/inferflux.v1.PolicyService/CreateKey`) or a whole service
    (`/inferflux.v1.PolicyService/`) to the roles that may call it; the method's entry wins, no entry means nobody.
    """

    def __init__(self, identity: Identity, address: str, callers: Callers) -> None:
        self._identity = identity
        self._address = address
        self.grpc = grpc.aio.server(interceptors=[Border(callers)], options=SERVER_OPTIONS)
        self._has_started = False

    async def start(self) -> str:
        """Listen and serve; returns the actual address. Raises ConfigError when the address can't be used."""
        try:
            port = self.grpc.add_secure_port(self._address, self._identity.server_credentials())
        except RuntimeError as e:
            await self.stop()
            raise ConfigError(f"gRPC cannot listen on {self._address}: in use or not valid") from e
        await self._start()
        if self._address.startswith("unix:"):
            os.chmod(self._address[5:], 0o600)  # noqa: PTH101  -- one syscall
            return self._address
        return f"{self._address.rpartition(':')[0]}:{port}"

    async def stop(self, grace_s: float | None = None) -> None:
        """Refuse new calls, let running ones finish for `grace_s`, then cancel them. Idempotent."""
        if not self._has_started:  # gRPC 1.85 crashes the interpreter when such a server is garbage-collected
            await self._start()
        await self.grpc.stop(grace_s)

    async def _start(self) -> None:
        self._has_started = True
        await self.grpc.start()


class Border(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in its stubs only
    """Stands between the wire and every handler: authorises, maps errors, measures."""

    def __init__(self, callers: Callers) -> None:
        self._callers = callers
        self._guarded: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Wrap a method's handler; each is wrapped once, unknown methods stay UNIMPLEMENTED."""
        method = handler_call_details.method
        if method not in self._guarded:
            handler: Any = await continuation(handler_call_details)
            if handler is None:
                return cast("grpc.RpcMethodHandler[Any, Any]", handler)
            self._guarded[method] = self._guard(method, handler)
        return self._guarded[method]

    def _guard(self, method: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        allowed = self._allowed(method)
        behavior, make = _parts(handler)
        serve = _serve_stream if handler.response_streaming else _serve_one

        async def guarded(request: Any, context: Context) -> Any:
            started_at, code = time.perf_counter(), grpc.StatusCode.OK
            try:
                _authorise(method, allowed, context)
                return await serve(behavior, request, context)
            except asyncio.CancelledError:
                code = grpc.StatusCode.CANCELLED
                raise
            except grpc.aio.AbortError:
                code = grpc.StatusCode.ABORTED  # the handler chose its own status; which one is on the wire only
                raise
            except Exception as e:  # noqa: BLE001  -- the border: nothing else may pass
                error = _presentable(e, method)
                code = error.grpc_code
                await context.abort(code, error.message[:MAX_DETAILS], _trailers(error))
            finally:
                metrics.RPC_SECONDS.labels(method, code.name).observe(time.perf_counter() - started_at)

        return cast(
            "grpc.RpcMethodHandler[Any, Any]",
            make(guarded, handler.request_deserializer, handler.response_serializer),
        )

    def _allowed(self, method: str) -> frozenset[str]:
        service = method[: method.rindex("/") + 1]
        return self._callers.get(method, self._callers.get(service, frozenset()))


def _parts(handler: Any) -> tuple[Behavior, Callable[..., Any]]:
    """Split a handler into its function and the factory that makes another handler of the same shape."""
    if handler.request_streaming and handler.response_streaming:
        return handler.stream_stream, grpc.stream_stream_rpc_method_handler
    if handler.request_streaming:
        return handler.stream_unary, grpc.stream_unary_rpc_method_handler
    if handler.response_streaming:
        return handler.unary_stream, grpc.unary_stream_rpc_method_handler
    return handler.unary_unary, grpc.unary_unary_rpc_method_handler


async def _serve_one(behavior: Behavior, request: Any, context: Context) -> Any:
    return await behavior(request, context)


async def _serve_stream(behavior: Behavior, request: Any, context: Context) -> None:
    """Write what the handler yields. Closes its generator even when the caller is gone in the middle of a write."""
    responses = behavior(request, context)
    if not hasattr(responses, "__aiter__"):
        await responses  # the handler writes through its context
        return
    async with aclosing(cast("Any", responses)) as stream:
        async for response in cast("AsyncIterator[Any]", stream):
            await context.write(response)


def _authorise(method: str, allowed: frozenset[str], context: Context) -> None:
    role = caller_role(cast("Mapping[str, list[bytes]]", context.auth_context()))
    if role not in allowed:
        raise PermissionDenied(f"role {role or 'unknown'} may not call {method}")


def _presentable(error: Exception, method: str) -> InferfluxError:
    if isinstance(error, InferfluxError):
        return error
    _log.error("handler failed", exc_info=error, extra={"method": method})
    return Internal("internal error")


def _trailers(error: InferfluxError) -> tuple[tuple[str, str], ...]:
    pairs = [(REASON_KEY, error.reason)]
    if error.retry_after_s is not None:
        pairs.append((RETRY_AFTER_KEY, f"{error.retry_after_s:g}"))
    if error.param is not None and error.param.isascii() and error.param.isprintable():
        pairs.append((PARAM_KEY, error.param[:MAX_DETAILS]))
    return tuple(pairs)
