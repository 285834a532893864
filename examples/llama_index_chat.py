"""LlamaIndex: an answer, a stream, a completion."""

import os

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

URL = os.environ.get("INFERFLUX_URL", "http://127.0.0.1:8080")
model = OpenAILike(
    api_base=f"{URL}/v1",
    api_key=os.environ["INFERCTL_API_KEY"],
    model=os.environ.get("INFERFLUX_MODEL", "smollm2-135m"),
    is_chat_model=True,
    max_tokens=32,
    temperature=0,
)
question = [ChatMessage(role="user", content="What is the capital of France?")]
print("answer:", model.chat(question).message.content)
print("stream:", "".join(part.delta or "" for part in model.stream_chat(question)))
print("completion:", model.complete("The capital of France is").text)
