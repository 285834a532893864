"""What the registry says against a model, asked before the model is loaded and remembered for when nobody answers.

Asked by a child process: whoever has gRPC's threads must not fork, and an engine that is not started yet will.
`python -m inferflux.worker.rules ADDRESS PKI_DIR ROLE MODEL SECONDS` prints the rules as JSON.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from inferflux.errors import InferfluxError, Unavailable
from inferflux.models.rules import Rules
from inferflux.paths import private_dir
from inferflux.types import Role
from inferflux.worker.settings import WorkerSettings

ANSWER_S, REMEMBERING_ANSWER_S = 15.0, 2.0
"""How long the registry may take to answer, without and with an earlier answer at hand: it may be starting itself."""
CHILD_S = 10.0
"""What the child itself may take besides."""
_log = logging.getLogger(__name__)


async def ask(settings: WorkerSettings, role: Role) -> Rules:
    """Return the newest rules there are. Without a registry there are none.

    Raises Unavailable when the registry does not answer and never did.
    """
    if not settings.registry_address:
        return Rules()
    path = _memory(settings)
    known = _load(path)
    told = await _ask_registry(settings, role, REMEMBERING_ANSWER_S if known else ANSWER_S)
    if told is None and known is None:
        raise Unavailable(f"the registry does not say which versions of model {settings.model} may be loaded")
    if told is None or (known is not None and known.revision > told.revision):
        _log.warning("rules of the model are those remembered", extra={"revision": known.revision if known else 0})
        return known or Rules()
    _save(path, told)
    return told


def _memory(settings: WorkerSettings) -> Path:
    """One file per model and worker: two workers never write the same."""
    name = hashlib.sha256(f"{settings.instance_id}/{settings.model}".encode()).hexdigest()[:32]
    return private_dir(settings.home / "model-rules") / f"{name}.json"


async def _ask_registry(settings: WorkerSettings, role: Role, answer_s: float) -> Rules | None:
    arguments = (settings.registry_address, str(settings.pki_dir), role.value, settings.model, str(answer_s))
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        __spec__.name,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(CHILD_S + answer_s):
            text, _ = await child.communicate()
        return _parse(text)
    except (TimeoutError, ValueError, KeyError, TypeError):
        return None
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


def _parse(text: str | bytes) -> Rules:
    document: dict[str, Any] = json.loads(text)
    return Rules(int(document["floor"]), frozenset(map(str, document["revoked"])), int(document["revision"]))


def _dump(rules: Rules) -> str:
    return json.dumps({"floor": rules.floor, "revoked": sorted(rules.revoked), "revision": rules.revision})


def _load(path: Path) -> Rules | None:
    try:
        return _parse(path.read_text())
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _save(path: Path, rules: Rules) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(_dump(rules))
    partial.replace(path)


async def _fetch(address: str, pki_dir: str, role: str, model: str, answer_s: str) -> Rules:
    from inferflux.rpc.client import open_channel, translated_errors  # noqa: PLC0415 - in the child only
    from inferflux.rpc.mtls import Identity  # noqa: PLC0415
    from inferflux.v1 import registry_service_pb2 as pb  # noqa: PLC0415
    from inferflux.v1.registry_service_pb2_grpc import RegistryServiceStub  # noqa: PLC0415

    async with open_channel(address, Identity.load(Path(pki_dir), role), "registry") as channel:
        stub: Any = RegistryServiceStub(channel)
        with translated_errors():
            request = pb.GetModelRulesRequest(model=model)
            answer = await stub.GetModelRules(request, timeout=float(answer_s), wait_for_ready=True)
    return Rules(answer.floor, frozenset(answer.revoked_key_ids), answer.revision)


def main(arguments: list[str]) -> int:
    """Print the rules; returns the exit code."""
    try:
        rules = asyncio.run(_fetch(*arguments))
    except InferfluxError as e:
        sys.stderr.write(f"{e.reason}: {e.message}\n")
        return 1
    sys.stdout.write(_dump(rules))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
