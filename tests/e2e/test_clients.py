"""The clients that people use, against a real cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator

import anthropic
import openai
import pytest

from tests.support.cluster import Cluster

MODEL = "smollm2-135m"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
# Newer Anthropic clients have no parameter for it; the API does.
GREEDY = {"temperature": 0}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "large": {"type": "boolean"}},
    "required": ["city", "large"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(vllm_cluster: Cluster) -> Iterator[openai.OpenAI]:
    url, key = f"{vllm_cluster.url}/v1", vllm_cluster.api_key
    with openai.OpenAI(base_url=url, api_key=key, timeout=120, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(vllm_cluster: Cluster) -> Iterator[anthropic.Anthropic]:
    url, key = vllm_cluster.url, vllm_cluster.api_key
    with anthropic.Anthropic(base_url=url, api_key=key, timeout=120, max_retries=0) as client:
        yield client


def test_chat_answers(client: openai.OpenAI) -> None:
    """A chat completion is right and its usage adds up."""
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=16)

    assert "Paris" in answer.choices[0].message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streamed_chat_equals_the_whole_one(client: openai.OpenAI) -> None:
    """Streamed deltas make up the text of the answer that is not streamed."""
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=16)
    stream = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=16, stream=True)
    events = [event.choices[0] for event in stream if event.choices]

    assert whole.choices[0].message.content == "".join(event.delta.content or "" for event in events)
    assert whole.choices[0].finish_reason == events[-1].finish_reason


def test_completion(client: openai.OpenAI) -> None:
    """A plain completion continues its prompt."""
    answer = client.completions.create(model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=4)

    assert "Paris" in answer.choices[0].text


def test_a_list_of_prompts(client: openai.OpenAI) -> None:
    """Each prompt of one call gets its own ticket and its own answer."""
    prompts = ["The capital of France is", "The capital of Italy is"]
    together = client.completions.create(model=MODEL, prompt=prompts, temperature=0, max_tokens=3)
    alone = [client.completions.create(model=MODEL, prompt=p, temperature=0, max_tokens=3) for p in prompts]

    assert [a.choices[0].text for a in alone] == [c.text for c in together.choices]


def test_equal_prompts_of_one_call(client: openai.OpenAI) -> None:
    """Each of two equal prompts has a ticket of its own."""
    answer = client.completions.create(model=MODEL, prompt=["One, two,"] * 2, temperature=0, max_tokens=3)

    assert answer.choices[0].text == answer.choices[1].text


def test_beam_search(client: openai.OpenAI) -> None:
    """Beams, which the application runs itself, work on the decode worker."""
    beams = {"use_beam_search": True}
    answer = client.completions.create(
        model=MODEL, prompt="The capital of France is", n=2, temperature=0, max_tokens=3, extra_body=beams
    )

    assert "Paris" in answer.choices[0].text


def test_a_client_cannot_speak_to_the_engine(client: openai.OpenAI) -> None:
    """Fields that our processes exchange through vLLM's parameters mean nothing when a client sends them."""
    ask = {"model": MODEL, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 3}
    forged = {
        "kv_transfer_params": {"source": {}, "publish": True, "do_remote_prefill": True},
        "vllm_xargs": {"inferflux_delivered": [1_000_000_000]},
    }

    expected = client.completions.create(**ask)
    assert expected.choices[0].text == client.completions.create(**ask, extra_body=forged).choices[0].text


def test_responses(client: openai.OpenAI) -> None:
    """The responses API answers, streamed and not."""
    ask = {"model": MODEL, "input": "What is the capital of France?", "temperature": 0, "max_output_tokens": 16}
    answer = client.responses.create(**ask)
    events = list(client.responses.create(**ask, stream=True))

    assert "Paris" in answer.output_text
    assert answer.output_text == "".join(e.delta for e in events if e.type == "response.output_text.delta")


def test_two_choices_with_a_seed_are_reproducible(client: openai.OpenAI) -> None:
    """n=2 gives two choices, and the same seed gives them again."""
    ask = {"model": MODEL, "messages": QUESTION, "n": 2, "seed": 7, "temperature": 1.0, "max_tokens": 8}
    first, second = (client.chat.completions.create(**ask) for _ in range(2))
    texts = [[c.message.content for c in answer.choices] for answer in (first, second)]

    assert texts[0] == texts[1]
    assert len(first.choices) == 2


def test_logprobs(client: openai.OpenAI) -> None:
    """Each token comes with its log-probability; a greedy token is the likeliest."""
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=4, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content

    assert len(content) == 4
    assert all(token.logprob == max(t.logprob for t in token.top_logprobs) for token in content)


def test_stop_string(client: openai.OpenAI) -> None:
    """Text ends before the stop string."""
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=16, stop=[" France"]
    )

    assert answer.choices[0].message.content == "The capital of"
    assert answer.choices[0].finish_reason == "stop"


def test_json_schema(client: openai.OpenAI) -> None:
    """Structured output is valid JSON of the schema."""
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Describe Paris as JSON with city and large."}],
        temperature=0,
        max_tokens=40,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}},
    )
    document = json.loads(answer.choices[0].message.content)

    assert {"city", "large"} == set(document)
    assert isinstance(document["large"], bool)


def test_anthropic_messages(claude: anthropic.Anthropic) -> None:
    """The Anthropic client gets an answer with its key in x-api-key, streamed and not."""
    answer = claude.messages.create(model=MODEL, messages=QUESTION, max_tokens=16, extra_body=GREEDY)
    with claude.messages.stream(model=MODEL, messages=QUESTION, max_tokens=16, extra_body=GREEDY) as stream:
        streamed = stream.get_final_text()

    assert "Paris" in answer.content[0].text
    assert answer.content[0].text == streamed


def test_anthropic_token_count(claude: anthropic.Anthropic) -> None:
    """Counting tokens agrees with what the prompt costs."""
    count = claude.messages.count_tokens(model=MODEL, messages=QUESTION)
    answer = claude.messages.create(model=MODEL, messages=QUESTION, max_tokens=1, extra_body=GREEDY)

    assert answer.usage.input_tokens == count.input_tokens


def test_models(client: openai.OpenAI) -> None:
    """The registry's models are listed under their names."""
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


def test_wrong_key_model_and_body(client: openai.OpenAI, vllm_cluster: Cluster) -> None:
    """Mistakes get the errors that the client knows."""
    ask = {"model": MODEL, "messages": QUESTION, "max_tokens": 1}

    with (
        openai.OpenAI(base_url=f"{vllm_cluster.url}/v1", api_key="ifx_wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.chat.completions.create(**ask)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**ask | {"model": "nope"})
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**ask | {"temperature": -3})
