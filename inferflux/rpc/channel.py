"""A channel that outlives its certificates: calls that begin after the files have changed use the new ones.

Streams that run keep their connection, whose certificates were checked when it was made. When it breaks, whoever held
the stream calls again, and that call finds the new files.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from inferflux.rpc.mtls import Identity

LOOK_EVERY_S = 5.0
Options = Sequence[tuple[str, Any]]


class RenewingChannel(grpc.aio.Channel):
    """One address, one identity, and as many channels one after the other as the identity has had certificates."""

    def __init__(self, address: str, identity: Identity, options: Options) -> None:
        self._address = address
        self._identity = identity
        self._options = options
        self._looked_at = time.monotonic()
        self._channels = [self._open()]

    @property
    def current(self) -> grpc.aio.Channel:
        """The channel for the next call."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = now
            identity = self._identity.current()
            if identity != self._identity:
                self._identity = identity
                self._channels.append(self._open())
        return self._channels[-1]

    async def close(self, grace: float | None = None) -> None:
        for channel in self._channels:
            await channel.close(grace)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:  # noqa: FBT001, FBT002  -- gRPC's
        return self.current.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self.current.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self.current.channel_ready()

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return _Method(self, "unary_unary", args, kwargs)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return _Method(self, "unary_stream", args, kwargs)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return _Method(self, "stream_unary", args, kwargs)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return _Method(self, "stream_stream", args, kwargs)

    def _open(self) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(self._address, self._identity.channel_credentials(), self._options)


class _Method:
    """One method of a stub, on the channel that is current when it is called."""

    def __init__(self, channel: RenewingChannel, shape: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._channel = channel
        self._shape, self._args, self._kwargs = shape, args, kwargs
        self._bound: tuple[grpc.aio.Channel | None, Any] = None, None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        channel = self._channel.current
        if self._bound[0] is not channel:
            self._bound = channel, getattr(channel, self._shape)(*self._args, **self._kwargs)
        return self._bound[1](*args, **kwargs)
