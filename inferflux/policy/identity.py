"""The section `identity` of the policy document: who there is besides the holders of API keys."""

from __future__ import annotations

from inferflux.policy.section import Section


class IdentitySection(Section):
    """Absent: only API keys open anything."""
