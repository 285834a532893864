"""The examples, run as their readers run them, on a real cluster."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples"
TOOLS = Path(sys.executable).parents[1] / "tools/examples"
NODE_FOLDER = TOOLS / "node"
# What each says, in order.
LINES = {
    "openai_client.py": ("answer", "stream", "response", "object", "tool call"),
    "anthropic_client.py": ("answer", "stream", "tool call"),
    "langchain_chat.py": ("answer", "stream", "object"),
    "llama_index_chat.py": ("answer", "stream", "completion"),
    "pydantic_ai_agent.py": ("object", "stream"),
    "instructor_extract.py": ("tool_call", "json_schema_mode"),
    "litellm_chat.py": ("answer", "stream", "messages"),
    "vercel_ai.mjs": ("answer", "stream", "object", "tool call"),
}
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster.start(engine="vllm", options=["--dtype", "float32"]) as cluster:
        yield cluster


def command(name: str) -> list[str]:
    """How to run an example; Node looks for packages beside the script."""
    if name.endswith(".py"):
        return [str(TOOLS / "bin/python"), str(EXAMPLES / name)]
    return ["node", str(shutil.copy(EXAMPLES / name, NODE_FOLDER))]


def test_every_example_is_here() -> None:
    assert set(LINES) == {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".mjs")}


@pytest.mark.parametrize("name", LINES)
def test_the_example_runs(cluster: Cluster, name: str) -> None:
    """It ends well, says each of its lines, and none of them is empty."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    env = {"INFERFLUX_URL": cluster.url, "INFERFLUX_MODEL": cluster.model, "INFERCTL_API_KEY": cluster.api_key, **kept}
    ran = subprocess.run(command(name), env=env, capture_output=True, text=True, timeout=300, check=False)

    assert ran.returncode == 0, ran.stderr
    labels = "|".join(LINES[name])
    said = re.findall(rf"^({labels}): *(\S.*)$", ran.stdout, re.MULTILINE)
    assert tuple(label for label, _ in said) == LINES[name], ran.stdout
