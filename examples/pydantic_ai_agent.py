"""Pydantic AI: an agent whose answer is an object, and one that streams text."""

import asyncio
import os

from openai import AsyncOpenAI
from pydantic import BaseModel, Field
from pydantic_ai import Agent, ModelSettings, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

URL = os.environ.get("INFERFLUX_URL", "http://127.0.0.1:8080")
MODEL = os.environ.get("INFERFLUX_MODEL", "smollm2-135m")


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    is_capital: bool


async def main() -> None:
    """Ask both agents."""
    async with AsyncOpenAI(base_url=f"{URL}/v1", api_key=os.environ["INFERCTL_API_KEY"]) as client:
        model = OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=client))
        settings = ModelSettings(max_tokens=64, temperature=0)

        result = await Agent(model, output_type=NativeOutput(City), model_settings=settings).run("Describe Paris.")
        print("object:", result.output)

        async with Agent(model, model_settings=settings).run_stream("What is the capital of France?") as stream:
            print("stream:", "".join([text async for text in stream.stream_text(delta=True)]))


asyncio.run(main())
