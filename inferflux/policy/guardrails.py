"""The section `guardrails` of the policy document: what may be said."""

from __future__ import annotations

from inferflux.policy.section import Section


class GuardrailsSection(Section):
    """Absent: nothing is looked at."""
