"""Guardrails: what may go to a model and what may come back. `guard` is the way in."""
