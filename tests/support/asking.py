"""Clients that go on asking while a test does something to the cluster."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx


@contextmanager
def asking(client: httpx.Client, path: str, body: Mapping[str, Any], num_clients: int) -> Iterator[list[Future[int]]]:
    """Ask again and again in the block; each client tells how often it was answered, in full or it fails."""
    is_over = threading.Event()

    def ask() -> int:
        num_done = 0
        while not is_over.is_set():
            answer = client.post(path, json=body).raise_for_status().json()
            assert answer["usage"]["completion_tokens"] == body["max_tokens"]
            num_done += 1
        return num_done

    with ThreadPoolExecutor(num_clients) as pool:
        clients = [pool.submit(ask) for _ in range(num_clients)]
        try:
            yield clients
        finally:
            is_over.set()
