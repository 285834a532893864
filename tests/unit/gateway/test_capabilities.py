"""What a body asks of a model, and what a model is not asked for."""

from __future__ import annotations

import pytest

from inferflux.errors import CapabilityNotSupported
from inferflux.models.capabilities import Capability
from services.gateway.capabilities import Wants, read, require
from services.gateway.endpoints import ENDPOINTS
from services.gateway.views import Model

CHAT = "/v1/chat/completions"
IMAGE = {"role": "user", "content": [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": "x"}}]}


def model(*capabilities: str, max_model_len: int = 2048) -> Model:
    return Model("m", "d", "float32", max_model_len, capabilities, 1, is_default=True)


@pytest.mark.parametrize(
    ("document", "capability", "name"),
    [
        ({"tools": [{}]}, Capability.TOOLS, "tools"),
        ({"functions": [{}]}, Capability.TOOLS, "functions"),
        ({"logprobs": True}, Capability.LOGPROBS, "logprobs"),
        ({"logprobs": 0}, Capability.LOGPROBS, "logprobs"),
        ({"prompt_logprobs": 1}, Capability.LOGPROBS, "prompt_logprobs"),
        ({"response_format": {"type": "json_schema"}}, Capability.JSON_SCHEMA, "response_format"),
        ({"response_format": {"type": "json_object"}}, Capability.JSON_SCHEMA, "response_format"),
        ({"text": {"format": {"type": "json_schema"}}}, Capability.JSON_SCHEMA, "text"),
        ({"structured_outputs": {"regex": "a"}}, Capability.JSON_SCHEMA, "structured_outputs"),
        ({"messages": [IMAGE]}, Capability.VISION, "messages"),
        ({"input": [{"content": [{"type": "input_image"}]}]}, Capability.VISION, "input"),
        ({"messages": [{"content": [{"type": "image", "source": {}}]}]}, Capability.VISION, "messages"),
    ],
)
def test_what_asks_for_a_capability(document, capability, name):
    """Refused with the field's name when the model lacks it, passed when it has it."""
    wants = read(document)
    with pytest.raises(CapabilityNotSupported, match=f"does not do {capability}") as caught:
        require(model("chat"), CHAT, wants)

    assert caught.value.param == name
    require(model("chat", capability), CHAT, wants)


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"tools": [], "functions": None, "logprobs": False, "response_format": {"type": "text"}, "text": {}},
        {"messages": "no list", "response_format": [], "text": 3, "max_tokens": "many"},
        {"messages": [3, {"content": [3, {"type": []}, {"type": "text"}]}, {"content": "image"}]},
        {"max_tokens": True, "max_completion_tokens": None},
    ],
)
def test_what_asks_for_nothing(document):
    """Neither what is empty nor what is malformed: that is the application's to answer."""
    assert read(document) == Wants()


@pytest.mark.parametrize("path", sorted(set(ENDPOINTS) - {"/tokenize", "/detokenize"}))
def test_each_path_has_its_capability(path):
    """A model that can do everything serves it, one that can do something else does not."""
    require(model(*Capability), path, Wants())
    with pytest.raises(CapabilityNotSupported):
        require(model("lora"), path, Wants())


def test_a_model_of_which_nothing_is_known_is_asked_for_anything():
    """Its application answers."""
    require(None, CHAT, read({"tools": [{}]}))
    require(model(), CHAT, read({"tools": [{}]}))
    require(model("lora"), "/tokenize", Wants())


def test_more_output_than_the_context_is_refused():
    """No prompt could make it fit; without a known length nothing is refused."""
    wants = read({"max_tokens": 10, "max_completion_tokens": 2049})

    with pytest.raises(CapabilityNotSupported, match=r"2049 output tokens.* holds 2048"):
        require(model("chat"), CHAT, wants)
    require(model("chat", max_model_len=2049), CHAT, wants)
    require(model("chat", max_model_len=0), CHAT, wants)
