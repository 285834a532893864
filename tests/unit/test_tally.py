from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from inferflux.telemetry.tally import TallyHistogram

BUCKETS = (0.01, 0.1, 1.0)
VALUES = (0.005, 0.01, 0.0100001, 0.5, 1.0, 7.0, 0.0)


def test_it_reads_like_the_original():
    """The exposition is the same, byte for byte, but for the order of sum and count."""
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tally = TallyHistogram("h_seconds", "Help.", ("a", "b"), BUCKETS, ours)
    histogram = Histogram("h_seconds", "Help.", ("a", "b"), buckets=BUCKETS, registry=theirs)
    for labels in (("x", "y"), ("x", 'quo"te')):
        for value in VALUES:
            tally.labels(*labels).observe(value)
            histogram.labels(*labels).observe(value)
    expected = [line for line in generate_latest(theirs).decode().splitlines() if "_created" not in line]

    assert sorted(generate_latest(ours).decode().splitlines()) == sorted(expected)


def test_a_wrong_number_of_labels_is_refused():
    """As prometheus_client does."""
    tally = TallyHistogram("h_seconds", "Help.", ("a",), BUCKETS, CollectorRegistry())

    with pytest.raises(ValueError, match="labels"):
        tally.labels("x", "y")
