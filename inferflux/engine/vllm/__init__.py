"""The vLLM engine. The only package that imports vllm and torch; everything specific to a vLLM version is here.

Two processes: the worker's own (the application, the client `llm.TicketLLM`) and vLLM's engine core, forked from it
(scheduler, model, `connector.ArenaConnector`). They share the arena and a pipe of transfer reports.
"""

from inferflux.engine.vllm.engine import VllmEngine

__all__ = ["VllmEngine"]
