"""LangChain: an answer, a stream, an object of a schema."""

import os

from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    is_capital: bool


URL = os.environ.get("INFERFLUX_URL", "http://127.0.0.1:8080")
model = ChatOpenAI(
    base_url=f"{URL}/v1",
    api_key=os.environ["INFERCTL_API_KEY"],
    model=os.environ.get("INFERFLUX_MODEL", "smollm2-135m"),
    max_completion_tokens=64,
    temperature=0,
)
print("answer:", model.invoke("What is the capital of France?").text)
print("stream:", "".join(chunk.text for chunk in model.stream("What is the capital of France?")))
print("object:", model.with_structured_output(City, method="json_schema").invoke("Describe Paris as JSON."))
