"""LiteLLM: an answer, a stream, and the same model in Anthropic's dialect."""

import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # nothing is fetched
import litellm

URL = os.environ.get("INFERFLUX_URL", "http://127.0.0.1:8080")
MODEL = os.environ.get("INFERFLUX_MODEL", "smollm2-135m")
KEY = os.environ["INFERCTL_API_KEY"]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

openai = {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": KEY}
answer = litellm.completion(**openai, messages=QUESTION, max_tokens=32, temperature=0)
print("answer:", answer.choices[0].message.content)

stream = litellm.completion(**openai, messages=QUESTION, max_tokens=32, temperature=0, stream=True)
print("stream:", "".join(chunk.choices[0].delta.content or "" for chunk in stream))

answer = litellm.completion(
    model=f"anthropic/{MODEL}", api_base=URL, api_key=KEY, messages=QUESTION, max_tokens=32, temperature=0
)
print("messages:", answer.choices[0].message.content)
