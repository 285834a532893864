"""Instructor: objects by a tool call and by a JSON schema."""

import os

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field

URL = os.environ.get("INFERFLUX_URL", "http://127.0.0.1:8080")
MODEL = os.environ.get("INFERFLUX_MODEL", "smollm2-135m")


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    is_capital: bool


with OpenAI(base_url=f"{URL}/v1", api_key=os.environ["INFERCTL_API_KEY"]) as client:
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        city = instructor.from_openai(client, mode=mode).chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Paris is the capital of France."}],
            response_model=City,
            max_tokens=64,
            temperature=0,
        )
        print(f"{mode.value}:", city)
