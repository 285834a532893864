"""What network policies allow, worked out from their text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tests.support.fake_kube.selectors import selects

Labels = dict[str, str]
Policy = dict[str, Any]


def allows(policies: Iterable[Policy], source: Labels, target: Labels, port: int) -> bool:
    """Whether a pod may connect to another of its namespace: its egress and the other's ingress must agree."""
    policies = list(policies)
    return _permits(policies, source, target, port, "Egress") and _permits(policies, target, source, port, "Ingress")


def allows_outside(policies: Iterable[Policy], source: Labels, port: int) -> bool:
    """Whether a pod may connect to an address that belongs to no pod."""
    return _permits(list(policies), source, None, port, "Egress")


def _permits(policies: list[Policy], subject: Labels, peer: Labels | None, port: int, direction: str) -> bool:
    ours = [p["spec"] for p in policies if direction in p["spec"]["policyTypes"]]
    ours = [spec for spec in ours if selects(spec["podSelector"], subject)]
    if not ours:
        return True
    rules = [rule for spec in ours for rule in spec.get(direction.lower()) or ()]
    return any(_matches(rule, peer, port, "to" if direction == "Egress" else "from") for rule in rules)


def _matches(rule: dict[str, Any], peer: Labels | None, port: int, side: str) -> bool:
    ports, peers = rule.get("ports"), rule.get(side)
    if ports and not any(entry["port"] == port and entry.get("protocol", "TCP") == "TCP" for entry in ports):
        return False
    return not peers or any(_is_peer(entry, peer) for entry in peers)


def _is_peer(entry: dict[str, Any], peer: Labels | None) -> bool:
    if "ipBlock" in entry:
        return peer is None
    if "namespaceSelector" in entry:
        return False  # other namespaces than the pods' own
    return peer is not None and selects(entry["podSelector"], peer)
