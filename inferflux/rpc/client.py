"""The calling side of gRPC: channels to services of a role, and their errors as our own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from inferflux.errors import (
    DeadlineExceeded,
    InferfluxError,
    Internal,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from inferflux.rpc.channel import RenewingChannel
from inferflux.rpc.mtls import Identity, dns_name
from inferflux.rpc.options import CHANNEL_OPTIONS
from inferflux.rpc.server import PARAM_KEY, REASON_KEY, RETRY_AFTER_KEY


def open_channel(address: str, identity: Identity, server_role: str) -> grpc.aio.Channel:
    """Open a channel to `unix:/path` or `host:port` that accepts only a server of `server_role`. The caller closes it.

    Returns at once; connects with the first call and reconnects by itself, also when the certificates have changed.
    """
    options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", dns_name(server_role)))
    return RenewingChannel(address, identity, options)


def to_error(error: grpc.aio.AioRpcError) -> InferfluxError:
    """Rebuild the error that the server raised; failures of the transport become the nearest class of ours."""
    pairs: Iterable[Any] = error.trailing_metadata() or ()  # a tuple of pairs or a Metadata, which iterates as pairs
    trailers = {key: _text(value) for key, value in pairs}
    kind = _BY_REASON.get(trailers.get(REASON_KEY, ""))
    if kind is None:
        return _from_transport(error.code())
    retry_after = trailers.get(RETRY_AFTER_KEY)
    retry_after_s = float(retry_after) if retry_after else None
    return kind(error.details() or "", retry_after_s=retry_after_s, param=trailers.get(PARAM_KEY))


def error_of(reason: str, message: str) -> InferfluxError:
    """Rebuild an error that a service reported inside a stream."""
    return _BY_REASON.get(reason, Internal)(message)


@contextmanager
def translated_errors() -> Iterator[None]:
    """Raise our errors instead of gRPC's inside the block.

    A task that is cancelled while its call ends hears of its cancellation: grpc.aio keeps that to itself when the
    call's status came first, and a loop that calls again would never end.
    """
    num_before = num_cancels()
    try:
        yield
    except grpc.aio.AioRpcError as e:
        if num_cancels() == num_before:
            raise to_error(e) from e
    if num_cancels() > num_before:
        raise asyncio.CancelledError


def num_cancels() -> int:
    """How often the current task was asked to end."""
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0


def _text(value: str | bytes) -> str:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else value


def _from_transport(code: grpc.StatusCode) -> InferfluxError:
    """Classify by code alone: the transport's own texts name addresses and files, they stay in the cause.

    INTERNAL and UNKNOWN without a reason are never our servers': grpc.aio reports so a stream that ended, e.g. with
    its server, while a message was being written.
    """
    match code:
        case (
            grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED | grpc.StatusCode.INTERNAL | grpc.StatusCode.UNKNOWN
        ):
            return Unavailable("the service cannot be reached")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded("the service did not answer in time")
        case grpc.StatusCode.PERMISSION_DENIED:
            return PermissionDenied("the service refused this caller")
        case grpc.StatusCode.UNAUTHENTICATED:
            return Unauthenticated("the service does not know this caller")
        case _:
            return Internal("internal error")


def _classes(base: type[InferfluxError]) -> Iterator[type[InferfluxError]]:
    yield base
    for child in base.__subclasses__():
        yield from _classes(child)


_BY_REASON = {kind.reason: kind for kind in _classes(InferfluxError)} | {Internal.reason: Internal}
