from __future__ import annotations

import pytest

from inferflux.config import load
from inferflux.errors import ConfigError
from inferflux.kv import nixl
from inferflux.types import Transport
from inferflux.worker.settings import WorkerSettings

ENVIRONMENT = {"INFERFLUX_INSTANCE_ID": "decode-0", "INFERFLUX_MODEL": "m", "INFERFLUX_ENGINE": "sim"}


def settings(transport: str) -> WorkerSettings:
    return load(WorkerSettings, {**ENVIRONMENT, "INFERFLUX_KV_TRANSPORT": transport})


@pytest.mark.parametrize(
    ("transport", "offered"),
    [("auto", (Transport.SHM, Transport.NIXL)), ("shm", (Transport.SHM,)), ("nixl", (Transport.NIXL,))],
)
def test_a_worker_offers_what_it_is_told_to(transport: str, offered: tuple[Transport, ...]) -> None:
    """By default all there is, shared memory first."""
    assert settings(transport).transports == offered


def test_without_nixl_there_is_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is optional; who asks for it by name hears what is missing."""
    monkeypatch.setattr(nixl, "PACKAGES", ("no_such_package",))

    assert settings("auto").transports == settings("shm").transports == (Transport.SHM,)
    with pytest.raises(ConfigError, match=r"nixl is not installed: pip install 'inferflux\[nixl\]'"):
        settings("nixl")


def test_an_unknown_transport_is_refused() -> None:
    with pytest.raises(ConfigError, match="KV_TRANSPORT"):
        settings("rdma")
