"""The section `audit` of the policy document: what is written down of requests."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from inferflux.policy.section import Section


class AuditSection(Section):
    """Absent: as with the defaults. Admin actions and refusals are always written down."""

    sample: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the answered requests that are written down; 1: all of them."""
    debug_mode: bool = False
    """Write down prompts as they are, instead of their keyed hash."""
