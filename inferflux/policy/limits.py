"""The section `limits` of the policy document: how much anybody may ask for."""

from __future__ import annotations

from inferflux.policy.section import Section


class LimitsSection(Section):
    """Absent: nothing is limited."""
