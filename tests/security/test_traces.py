"""After everything else: no secret and no prompt is in anything that the processes have written."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from inferflux.paths import Home
from tests.security.site import CHAT, PROMPT_CANARY, Site
from tests.support.cluster import processes_of


def needles(site: Site) -> dict[str, bytes]:
    """What must not be found, by what it is."""
    home = Home(site.cluster.home)
    found = {f"a credential, number {i}": secret.encode() for i, secret in enumerate(sorted(site.secrets))}
    found["a prompt"] = PROMPT_CANARY.encode()
    for file in home.secrets.iterdir():
        content = file.read_bytes()
        if file.suffix == ".pub" or len(content) < 16:
            continue
        found |= {
            file.name: content,
            f"{file.name} in hexadecimal": content.hex().encode(),
            f"{file.name} in base64": base64.b64encode(content).rstrip(b"="),
        }
    for file in home.pki.rglob("*.key"):
        found[file.name] = file.read_bytes().splitlines()[1]
    return found


def written(site: Site) -> dict[Path, bytes]:
    """Everything below the home but the places for secrets, and what everybody may read of the processes."""
    home = Home(site.cluster.home)
    files = [file for file in home.root.rglob("*") if file.is_file()]
    files = [file for file in files if not file.is_relative_to(home.secrets) and not file.is_relative_to(home.pki)]
    files += [Path(f"/proc/{pid}/{name}") for pid in processes_of(home.root) for name in ("cmdline", "comm")]
    return {file: file.read_bytes() for file in files}


def test_nothing_that_is_secret_was_written_down(site):
    """In logs at their most talkative, in state, in the store, on command lines, in metrics."""
    site.chat(site.admin, seed=7)
    files = written(site)
    files[Path("metrics")] = site.client.get("/metrics", headers=site.admin).content
    names = {file.name for file in files}
    assert {"gateway-0.log", "policy-0.log", "decode-0.log", "prefill-0.log", "cmdline"} <= names
    assert any(file.is_relative_to(site.cluster.home) and b"ifx:{policy}" in data for file, data in files.items())
    assert len(site.secrets) > 20

    secrets = needles(site)
    assert [
        (str(file), what) for file, data in files.items() for what, needle in secrets.items() if needle in data
    ] == []


def test_the_search_finds_what_is_there(site, tmp_path):
    """It would notice."""
    secrets = needles(site)
    (tmp_path / "log").write_bytes(b"x" * 100 + b"y".join(secrets.values()) + b"z")
    data = (tmp_path / "log").read_bytes()

    assert [what for what, needle in secrets.items() if needle not in data] == []


@pytest.mark.parametrize("role", ["gateway", "policy", "registry", "prefill", "decode"])
def test_logs_are_lines_of_json_whatever_clients_send(site, role):
    """A line that a client made would be one that it can forge."""
    for text in ('x\n{"level":"ERROR","forged":1}', "x\r\nforged", "x\u2028forged", '","forged":"1'):
        site.chat(site.admin | {"user-agent": text.encode("unicode_escape").decode()}, model=text)
        site.client.get(f"{site.cluster.url}/v1/models/{text.encode().hex()}", headers=site.admin)
    lines = [json.loads(line) for line in site.cluster.log(role).splitlines() if line.startswith("{")]

    assert lines
    assert not [line for line in lines if "forged" in line]
    assert CHAT not in lines[0]
