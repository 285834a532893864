"""InferFlux: disaggregated LLM serving. Shared code of all services; see docs/walk.md for the walk of a request."""

import os

__version__ = "0.1.0"

# gRPC's C core reads this when it is imported, so it must be set before. On its default it writes a line of its own
# format to stderr for every connection that a peer closes: noise among our JSON lines.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
# Its older poller hands a message over fewer threads: a third less CPU per message, and idle processes sleep longer.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
