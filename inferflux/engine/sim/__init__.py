"""The simulated engine: a whole disaggregated worker's work without a model, exact to the token.

Its KV is a keyed hash chain of the tokens (`kv`) and every output token is computed from the KV bytes actually read,
so lost, stale, torn, reordered or foreign blocks change the output: one oracle finds them all. It speaks the JSON of
vLLM's application for the common endpoints (`api`). For tests, chaos and capacity studies; never the default of
anything.
"""

from inferflux.engine.sim.engine import SimEngine

__all__ = ["SimEngine"]
