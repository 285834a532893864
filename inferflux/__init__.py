"""InferFlux: disaggregated LLM serving. Shared code of all services; see docs/walk.md for the walk of a request."""

__version__ = "0.1.0"
