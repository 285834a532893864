"""The process that tries grammars out, one child per grammar: to compile one may take all that there is.

A child has so many seconds of CPU time and so many bytes beyond what it began with; then the kernel ends it, and the
engine never sees the grammar. The parent of the children is forked before the worker has threads, and does nothing
until the first grammar comes.

worker -> trial     one byte, and a socket on which the grammar comes as JSON: {"kind": 1, "spec": "..."}
child  -> socket    {"refusal": "why the grammar can't be used, or empty"}
trial  -> socket    {"died": -24}, when the child had no time for that
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.v1.structured_output.backend_types import StructuredOutputOptions

from inferflux.engine.vllm.plugin import die_with_parent

if TYPE_CHECKING:
    from inferflux.engine.options import GrammarLimits

OUT_OF_MEMORY = 12
MAX_REASON = 400
PAGE = resource.getpagesize()


def serve(orders: socket.socket, model_dir: str, limits: GrammarLimits) -> None:
    """Fork a child for each order until the worker is gone."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    tokenizer: Any = None
    with selectors.DefaultSelector() as selector:
        selector.register(orders, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.data is not None:
                    selector.unregister(key.fileobj)
                    _bury(key.fd, *key.data)
                    continue
                if (client := _take(orders)) is None:
                    return
                tokenizer = tokenizer or _load_tokenizer(model_dir)
                if (pid := os.fork()) == 0:
                    _run(client, tokenizer, limits)
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, client))


def _take(orders: socket.socket) -> socket.socket | None:
    message, fds, _, _ = socket.recv_fds(orders, 16, 1)
    return socket.socket(fileno=fds[0]) if message and fds else None


def _load_tokenizer(model_dir: str) -> Any:
    """Load what the engine's backend will have, too. Raises for a tokenizer that it can't use."""
    import llguidance.hf  # noqa: PLC0415
    from transformers import AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    return llguidance.hf.from_tokenizer(tokenizer, len(tokenizer))


def _bury(pidfd: int, pid: int, client: socket.socket) -> None:
    """Tell the worker how a child has ended."""
    os.close(pidfd)
    _, status = os.waitpid(pid, 0)
    with client, suppress(OSError):  # the worker may be gone
        client.sendall(json.dumps({"died": os.waitstatus_to_exitcode(status)}).encode() + b"\n")


def _run(client: socket.socket, tokenizer: Any, limits: GrammarLimits) -> None:
    """Be the child. Never returns."""
    status = os.EX_SOFTWARE
    try:
        with client.makefile("rb") as stream:
            order = json.load(stream)
        _limit(limits)
        refusal = examine(StructuredOutputOptions(order["kind"]), order["spec"], tokenizer)
        client.sendall(json.dumps({"refusal": refusal[:MAX_REASON].strip()}).encode() + b"\n")
        status = os.EX_OK
    except MemoryError:
        status = OUT_OF_MEMORY
    finally:
        os._exit(status)


def _limit(limits: GrammarLimits) -> None:
    """Bound what this process may still take. No core dump, and no last words: they would quote clients."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2):
        os.dup2(nothing, fd)
    used_s = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
    for signum in (signal.SIGXCPU, signal.SIGABRT, signal.SIGSEGV):
        signal.signal(signum, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (used_s + limits.cpu_s, used_s + limits.cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + limits.memory_bytes,) * 2)


def examine(kind: StructuredOutputOptions, spec: str, tokenizer: Any) -> str:
    """Compile a grammar as the engine would, and find the first tokens that it allows; says what is wrong with it."""
    import llguidance  # noqa: PLC0415
    import llguidance.torch  # noqa: PLC0415
    from vllm.v1.structured_output.backend_guidance import serialize_guidance_grammar  # noqa: PLC0415

    try:
        grammar = serialize_guidance_grammar(kind, spec, disable_any_whitespace=True)
    except (ValueError, KeyError, TypeError) as e:
        return str(e)
    if error := llguidance.LLMatcher.validate_grammar(grammar, None):
        return str(error)
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
    mask = llguidance.torch.allocate_token_bitmask(1, tokenizer.vocab_size)
    llguidance.torch.fill_next_token_bitmask(matcher, mask, 0)
    return str(matcher.get_error())
