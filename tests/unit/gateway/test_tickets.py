"""What the gateway does with the news of its tickets."""

from __future__ import annotations

from inferflux.telemetry import metrics
from inferflux.types import KvReport
from services.gateway.prefill import Tickets


def test_a_prompt_that_was_computed_again_is_counted_with_its_reason():
    """A transfer that does not work must not pass for one that does."""
    counter = metrics.KV_REJECTED.labels("digest")
    before = counter._value.get()

    Tickets().settle(KvReport("t-1", "recomputed", "digest"))

    assert counter._value.get() == before + 1
