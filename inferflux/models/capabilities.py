"""What a model can be asked for: the words that manifests, model records and the gateway share."""

from __future__ import annotations

from enum import StrEnum


class Capability(StrEnum):
    """One thing that a model can or can't do."""

    CHAT = "chat"
    COMPLETION = "completion"
    RESPONSES = "responses"
    MESSAGES = "messages"
    EMBEDDINGS = "embeddings"
    SCORE = "score"
    CLASSIFY = "classify"
    VISION = "vision"
    TOOLS = "tools"
    JSON_SCHEMA = "json_schema"
    LOGPROBS = "logprobs"
    LORA = "lora"


NEED_A_TEMPLATE = frozenset({Capability.CHAT, Capability.RESPONSES, Capability.MESSAGES, Capability.TOOLS})
POOLING = frozenset({Capability.EMBEDDINGS, Capability.SCORE, Capability.CLASSIFY})
GENERATIVE = frozenset(Capability) - POOLING - {Capability.VISION, Capability.LORA}


def of_generative(*, has_chat_template: bool) -> tuple[str, ...]:
    """What a language model can do when nobody says otherwise: without a template there is no conversation."""
    able = GENERATIVE if has_chat_template else GENERATIVE - NEED_A_TEMPLATE
    return tuple(c.value for c in Capability if c in able)


def effective(declared: tuple[str, ...], supported: tuple[str, ...]) -> tuple[str, ...]:
    """What is declared for the model and supported by the engine, in the engine's order."""
    return tuple(c for c in supported if c in declared)
