"""gRPC channel arguments shared by both sides, each with its reason."""

from __future__ import annotations

from typing import Any

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""A prompt of a million tokens, or a few images, fits."""

_COMMON: tuple[tuple[str, Any], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A peer that vanished without a reset (power, partition) is noticed after 15 s even on a silent stream. Liveness
    # that matters sooner is the Pulse: pings are answered by a C thread and prove nothing about Python.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

SERVER_OPTIONS: tuple[tuple[str, Any], ...] = (
    *_COMMON,
    ("grpc.so_reuseport", 0),  # a second process on our port is an error, not a load balancer
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
)

CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    *_COMMON,
    # A restarted peer is found again within a second; gRPC's own default waits up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.min_reconnect_backoff_ms", 3_000),  # time for one attempt: a TLS handshake with a peer that is starved
    ("grpc.use_local_subchannel_pool", 1),  # one channel's backoff must not delay another's
    ("grpc.enable_http_proxy", 0),  # a proxy in the environment is for the Internet, not for the cluster
    ("grpc.service_config_disable_resolution", 1),
)
