"""What a cluster's processes say of themselves in their metrics."""

from __future__ import annotations

from tests.support.cluster import Cluster


def ticket_event(event: str) -> str:
    return f'inferflux_tickets_total{{event="{event}"}}'


ISSUED = ticket_event("issued")


def samples(cluster: Cluster, process: str) -> list[tuple[str, float]]:
    """Scrape a process, e.g. decode-0: names with labels, and values."""
    role, _, number = process.partition("-")
    lines = [line for line in cluster.metrics(role, int(number or 0)).splitlines() if line.startswith("inferflux")]
    return [(name, float(value)) for name, _, value in (line.rpartition(" ") for line in lines)]


def count(cluster: Cluster, process: str, *names: str) -> float:
    """Sum up the samples of a process that start with one of these names."""
    return sum(value for name, value in samples(cluster, process) if name.startswith(names))


def inflight(cluster: Cluster, process: str) -> float:
    return count(cluster, process, "inferflux_inflight")


def is_idle(cluster: Cluster, num_decodes: int = 2) -> bool:
    """Whether nothing of any request is left anywhere: no work, no slot, no ticket."""
    if any(inflight(cluster, process) for process in ("gateway", *(f"decode-{i}" for i in range(num_decodes)))):
        return False
    prefill = dict(samples(cluster, "prefill"))
    ended = sum(prefill.get(ticket_event(event), 0) for event in ("released", "expired", "revoked"))
    busy = prefill['inferflux_inflight{role="prefill"}'] + prefill['inferflux_kv_slots{state="used"}']
    return busy == 0 and prefill.get(ISSUED, 0) == ended
