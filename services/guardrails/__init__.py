"""Guardrail workers: verdicts that need language models, far from the process that serves tokens."""
