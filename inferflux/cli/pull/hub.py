"""A Hugging Face-style hub: which files a repository has, and where each is. HF_ENDPOINT and HF_TOKEN are honoured."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import quote, urljoin

import httpx

from inferflux.cli.models import ModelError
from inferflux.cli.pull.download import TIMEOUT, RemoteFile
from inferflux.cli.pull.source import Hub

ENDPOINT = "https://huggingface.co"
MAX_PAGES = 100


def list_files(source: Hub) -> tuple[Hub, list[RemoteFile], str]:
    """Return the source at its commit, its files and its licence. Raises ModelError."""
    endpoint = os.environ.get("HF_ENDPOINT", ENDPOINT).rstrip("/")
    token = os.environ.get("HF_TOKEN", "")
    headers = {"authorization": f"Bearer {token}"} if token else {}
    with httpx.Client(headers=headers, timeout=TIMEOUT, follow_redirects=True) as client:
        api = f"{endpoint}/api/models/{source.repository}"
        about, _ = _get(client, f"{api}/revision/{quote(source.revision, safe='')}")
        commit = str(about["sha"])
        entries = _tree(client, f"{api}/tree/{commit}?recursive=true")
    base = f"{endpoint}/{source.repository}/resolve/{commit}/"
    files = [_file(entry, base, headers) for entry in entries if entry["type"] == "file"]
    licence = str((about.get("cardData") or {}).get("license") or "")
    return Hub(source.repository, commit, source.file), files, licence


def _tree(client: httpx.Client, url: str) -> list[dict[str, Any]]:
    """All pages of a listing."""
    entries: list[dict[str, Any]] = []
    for _ in range(MAX_PAGES):
        page, following = _get(client, url)
        entries += page
        if not following:
            return entries
        url = urljoin(url, following)
    raise ModelError(f"the repository has more than {MAX_PAGES} pages of files")


def _get(client: httpx.Client, url: str) -> tuple[Any, str]:
    """GET a document, and the address of the next page."""
    try:
        response = client.get(url)
        if response.is_error:
            hint = "; HF_TOKEN is not set" if response.status_code in (401, 403) else ""
            raise ModelError(f"the hub answers {response.status_code} to {url}{hint}")
        return response.json(), response.links.get("next", {}).get("url", "")
    except (httpx.HTTPError, ValueError) as e:
        raise ModelError(f"{url}: {str(e) or type(e).__name__}") from e


def _file(entry: dict[str, Any], base: str, headers: dict[str, str]) -> RemoteFile:
    """Large files are named by SHA-256, small ones as git names them."""
    lfs = entry.get("lfs")
    algorithm, digest = ("sha256", lfs["oid"]) if lfs else ("git", entry["oid"])
    return RemoteFile(entry["path"], base + quote(entry["path"]), int(entry["size"]), algorithm, digest, headers)
