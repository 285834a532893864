"""Clients that lose their connection, or their gateway, and come back for the rest of their stream."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest

from tests.support.cluster import Cluster, poll

CHAT = "/v1/chat/completions"
# Of the simulated engine, at 2 ms each: seconds, so that something can happen meanwhile.
NUM_TOKENS = 600
Event = tuple[int, str]
"""Its id and its data."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster.start(prefill=1, decode=2) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: Cluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cluster.url, headers=cluster.headers, timeout=30, trust_env=False) as client:
        yield client


def body(**fields) -> dict:
    messages = [{"role": "user", "content": "Tell me something. " * 10}]
    return {"messages": messages, "max_tokens": NUM_TOKENS, "temperature": 1, "seed": 5, "stream": True, **fields}


def parse(text: str) -> list[Event]:
    """Whole events only."""
    return [(int(number), data) for number, data in re.findall(r"id: (\d+)\n(?:event: \S+\n)?data: (.*)\n\n", text)]


def begin(client: httpx.Client, num_events: int, path: str = CHAT, **fields) -> tuple[str, list[Event]]:
    """Read the first events of a stream, at least so many, then break the connection; gives the request's id, too."""
    text = ""
    with client.stream("POST", path, json=body(**fields)) as response:
        assert response.status_code == 200
        for part in response.iter_text():
            text += part
            if len(parse(text)) >= num_events:
                break
    return response.headers["x-request-id"], parse(text)


def rest(client: httpx.Client, request_id: str, last: int) -> httpx.Response:
    return client.get(f"/v1/streams/{request_id}", headers={"last-event-id": str(last)})


def without_ids(data: str) -> str:
    """What two answers to the same question may differ in."""
    return re.sub(r'req_[0-9a-f]{24}|"created(_at)?":\d+', "", data)


def undisturbed(client: httpx.Client, path: str = CHAT, **fields) -> list[Event]:
    return parse(client.post(path, json=body(**fields)).text)


def assert_one_stream(whole: list[Event], events: list[Event]) -> None:
    assert [number for number, _ in events] == list(range(len(whole)))
    assert [without_ids(data) for _, data in events] == [without_ids(data) for _, data in whole]


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
@pytest.mark.parametrize("num_events", [1, 2, 50])
def test_a_client_that_lost_its_connection_gets_the_rest(client: httpx.Client, path: str, num_events: int) -> None:
    whole = undisturbed(client, path)
    request_id, events = begin(client, num_events, path)
    response = rest(client, request_id, events[-1][0])

    assert response.status_code == 200
    assert response.headers["x-request-id"] == request_id
    assert_one_stream(whole, events + parse(response.text))


def test_a_stream_may_be_had_again_from_anywhere(client: httpx.Client) -> None:
    """Also when it has ended: the client can't know that."""
    whole = undisturbed(client)
    request_id, events = begin(client, 20)
    first = rest(client, request_id, events[-1][0])
    again = rest(client, request_id, 9)
    from_the_start = client.get(f"/v1/streams/{request_id}")

    assert parse(again.text) == events[10:] + parse(first.text)
    assert_one_stream(whole, parse(from_the_start.text))


def test_a_client_whose_gateway_died_gets_the_rest_from_another(cluster: Cluster, client: httpx.Client) -> None:
    whole = undisturbed(client)
    text, request_id, is_killed = "", "", False
    with pytest.raises(httpx.HTTPError), client.stream("POST", CHAT, json=body()) as response:  # noqa: PT012
        request_id = response.headers["x-request-id"]
        for part in response.iter_text():
            text += part
            if len(parse(text)) >= 20 and not is_killed:
                is_killed = cluster.kill("gateway")["pid"] > 0
    events = parse(text)
    assert len(events) < len(whole)
    poll(lambda: is_ready(cluster), 10, "no gateway came back")
    response = rest(client, request_id, events[-1][0])

    assert response.status_code == 200
    assert_one_stream(whole, events + parse(response.text))


def is_ready(cluster: Cluster) -> bool:
    try:
        return httpx.get(cluster.url + "/readyz", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.parametrize(
    ("request_id", "last", "status"),
    [("req_" + "0" * 24, "1", 404), ("nonsense", "1", 404), ("req_" + "0" * 24, "one", 400)],
)
def test_what_is_not_there_can_not_be_resumed(client: httpx.Client, request_id: str, last: str, status: int) -> None:
    response = client.get(f"/v1/streams/{request_id}", headers={"last-event-id": last})

    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_streams_are_not_for_strangers(cluster: Cluster, client: httpx.Client) -> None:
    request_id, events = begin(client, 2)
    url = f"{cluster.url}/v1/streams/{request_id}"

    assert httpx.get(url, trust_env=False).status_code == 401
    assert client.post(f"/v1/streams/{request_id}").status_code == 405
    assert rest(client, request_id, events[-1][0]).status_code == 200
