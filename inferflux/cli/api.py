"""inferctl's HTTP client: the same API that everybody else uses."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, Self

import httpx

from inferflux.cli.failure import CliError, Exit
from inferflux.cli.state import ClusterState
from inferflux.paths import Home

DEFAULT_URL = "http://127.0.0.1:8080"
# Reading: a long prompt on a slow machine may take minutes to its first token.
TIMEOUT = httpx.Timeout(connect=5.0, read=600.0, write=30.0, pool=5.0)


class Api:
    """One gateway. Use as a context manager; errors are CliError with one line for people."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self.url = base_url(environ)
        key = environ.get("INFERCTL_API_KEY", "")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._has_key = bool(key)
        # trust_env off: a proxy from the environment must not see a key that is meant for this machine.
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def get(self, path: str) -> Any:
        return self._json("GET", path)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._json("POST", path, body)

    def put(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._json("PUT", path, body)

    def delete(self, path: str) -> Any:
        return self._json("DELETE", path)

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the JSON of each server-sent event. Raises CliError for an error event too."""
        with (
            self._errors(),
            self._client.stream("POST", path, json={**body, "stream": True}) as response,
        ):
            if response.is_error:
                response.read()
                raise self._refusal(response)
            for line in response.iter_lines():
                if not line.startswith("data:") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data:"))
                if "error" in event:
                    raise CliError(str(event["error"].get("message", event["error"])))
                yield event

    def lines(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """Yield each line of an answer in NDJSON."""
        with self._errors(), self._client.stream(method, path, json=body) as response:
            if response.is_error:
                response.read()
                raise self._refusal(response)
            for line in response.iter_lines():
                yield json.loads(line)

    def default_model(self) -> str:
        """Name the first model that is served."""
        models = self.get("/v1/models")["data"]
        if not models:
            raise CliError("no model is being served")
        return str(models[0]["id"])

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        with self._errors():
            response = self._client.request(method, path, json=body)
            if response.is_error:
                raise self._refusal(response)
            return response.json() if response.content else {}

    def _errors(self) -> Errors:
        return Errors(self.url)

    def _refusal(self, response: httpx.Response) -> CliError:
        if response.status_code in (401, 403):
            hint = "" if self._has_key else "set INFERCTL_API_KEY"
            return CliError(message_of(response), Exit.AUTH, hint=hint)
        return CliError(message_of(response))


class Errors:
    """Turns the transport's failures inside a `with` block into CliError."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        match error:
            case httpx.ConnectError() | httpx.ConnectTimeout():
                hint = "inferctl quickstart starts a cluster; INFERCTL_URL names another one"
                raise CliError(f"nothing answers at {self._url}", Exit.NOT_RUNNING, hint=hint) from error
            case httpx.HTTPError():
                raise CliError(f"{self._url}: {str(error) or type(error).__name__}") from error
            case ValueError():
                raise CliError(f"{self._url} does not answer in JSON: not InferFlux?") from error


def base_url(environ: Mapping[str, str]) -> str:
    """INFERCTL_URL, else where this home's cluster is or was last."""
    if url := environ.get("INFERCTL_URL"):
        return url.rstrip("/").removesuffix("/v1")
    state = ClusterState.load(Home.from_env(environ).state_file)
    return state.options.url if state else DEFAULT_URL


def message_of(response: httpx.Response) -> str:
    """Find the message in an error body shaped like OpenAI's or Anthropic's."""
    try:
        return f"{response.json()['error']['message']} ({response.status_code})"
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} {response.reason_phrase}"
