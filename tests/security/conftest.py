"""One cluster for all attacks: what one of them breaks, the next ones show."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.security.site import Site, running_site

# Thousands of requests, each with a dozen lines of the client's own.
for name in ("httpx", "httpcore"):
    logging.getLogger(name).setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    with running_site() as site:
        yield site


@pytest.fixture(autouse=True)
def _still_serves(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever was done to it, the cluster answers the next honest client, and none of its processes has died."""
    yield
    if "site" not in request.fixturenames:
        return
    site: Site = request.getfixturevalue("site")
    assert site.chat(site.visitors["generate of acme"].headers).status_code == 200
    assert {process["restarts"] for process in site.cluster.processes} <= {0}
