"""What the gateway costs: its CPU time per streamed request and per SSE event, at 1, 16 and 64 concurrent streams.

    python -m bench.gateway_cost [--streams 1,16,64] [--requests 256] [--no-peer] [--json FILE]

A real cluster with the sim engine: HTTP in, policy, routing, mTLS gRPC to the workers, SSE out. The CPU time is the
gateway process's own (/proc/<pid>/stat, user and system), all in. Engines are paced: a token each 20 ms for every
stream at once. The peer is vllm-router (Rust) between the same clients and a plain HTTP server that sends the same
events at the same pace; it is installed from PyPI into a cache of its own when it can be had.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import uvloop

from bench.peers import free_port
from tests.support.cluster import Cluster

NUM_TOKENS = 64
STEP_S = 0.02
GOAL_MS = 1.1
PEER = "vllm-router==0.1.17"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "inferflux" / "bench" / PEER
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
HEADERS = b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n"


@dataclass(frozen=True, slots=True)
class Target:
    """A server under test: where it listens, and which process's CPU time counts."""

    name: str
    port: int
    pid: int
    model: str
    api_key: str = ""

    def request(self) -> bytes:
        """One request as bytes."""
        messages = [{"role": "user", "content": "Tell me a story about a small machine."}]
        body = json.dumps(
            {
                "model": self.model,
                "messages": messages,
                "max_tokens": NUM_TOKENS,
                "ignore_eos": True,
                "stream": True,
            }
        )
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {self.api_key}\r\n"
        return f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()


@dataclass(frozen=True, slots=True)
class Result:
    """What one target cost at one number of streams."""

    target: str
    streams: int
    requests: int
    events: int
    cpu_ms_per_request: float
    cpu_us_per_event: float
    wall_s: float


def cpu_s(pid: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def environ_of(pid: int) -> dict[str, str]:
    """Environment a process was started with."""
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().rstrip("\0").split("\0")
    return dict(pair.split("=", 1) for pair in pairs)


def rss_mb(pid: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def client(target: Target, num_requests: int) -> int:
    """Send requests one after the other on one connection; returns how many events came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    num_events = 0
    try:
        for _ in range(num_requests):
            writer.write(target.request())
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"{target.name}: {head!r} {await reader.read(500)!r}")
            answer = await reader.readuntil(b"\r\n0\r\n\r\n")
            if b"[DONE]" not in answer:
                raise RuntimeError(f"{target.name}: the stream broke off: {answer[-300:]!r}")
            num_events += answer.count(b"data: ")
    finally:
        writer.close()
    return num_events


async def measure(target: Target, num_streams: int, num_requests: int) -> Result:
    """Run the load once warm."""
    await asyncio.gather(*(client(target, 1) for _ in range(num_streams)))
    each = max(1, num_requests // num_streams)
    before, started_at = cpu_s(target.pid), time.perf_counter()
    num_events = sum(await asyncio.gather(*(client(target, each) for _ in range(num_streams))))
    used_s, wall_s = cpu_s(target.pid) - before, time.perf_counter() - started_at
    total = each * num_streams
    return Result(target.name, num_streams, total, num_events, 1e3 * used_s / total, 1e6 * used_s / num_events, wall_s)


@contextlib.contextmanager
def inferflux(num_prefill: int) -> Iterator[tuple[Target, Cluster]]:
    """A cluster with one paced decode worker."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as profile:
        json.dump({"step_ms": 1e3 * STEP_S, "step_ms_per_sequence": 0, "prefill_ms_per_token": 0}, profile)
        profile.flush()
        env = {"INFERFLUX_SIM_PROFILE": profile.name, "INFERFLUX_MAX_NUM_SEQS": "256"}
        with Cluster.start(prefill=num_prefill, decode=1, env=env) as cluster:
            port = int(cluster.url.rpartition(":")[2])
            name = "gateway, prefill + decode" if num_prefill else "gateway, decode only"
            yield Target(name, port, cluster.pids["gateway-0"], cluster.model, cluster.api_key), cluster


async def serve_events(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, clock: Clock) -> None:
    """Answer requests as the sim engine does, event for event."""
    common = '"object":"chat.completion.chunk","created":1795441119,"model":"sim"'
    choice = '"choices":[{"index":0,"delta":{"content":" mori"},"logprobs":null,"finish_reason":null}]'
    event = f'data: {{"id":"chatcmpl-req_cd2292f89bfaa27b40b97adb",{common},{choice}}}\n\n'.encode()
    chunk = b"%x\r\n%b\r\n" % (len(event), event)
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"POST"):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")
                continue
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.partition(b":")[2]))
            writer.write(b"HTTP/1.1 200 OK\r\n" + HEADERS + b"\r\n" + chunk)
            for _ in range(NUM_TOKENS):
                await clock.tick()
                writer.write(chunk)
            writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
    writer.close()


class Clock:
    """Ticks for all streams at once, as an engine steps."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    async def tick(self) -> None:
        await self._next.wait()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(STEP_S)
            current, self._next = self._next, asyncio.Event()
            current.set()


def installed_peer() -> Path | None:
    """Where vllm-router is, installed now if need be; None when it can't be had."""
    if not (CACHE / "vllm_router").exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(CACHE)]
        if subprocess.run([*command, PEER, "setproctitle"], check=False, timeout=600).returncode:
            return None
    return CACHE


@contextlib.asynccontextmanager
async def vllm_router(path: Path) -> AsyncIterator[Target]:
    """vllm-router in front of a plain server."""
    clock = Clock()
    ticking = asyncio.create_task(clock.run())
    backend = await asyncio.start_server(lambda r, w: serve_events(r, w, clock), "127.0.0.1", 0)
    backend_url = f"http://127.0.0.1:{backend.sockets[0].getsockname()[1]}"
    port, metrics_port = free_port(), free_port()
    command = [sys.executable, "-m", "vllm_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--worker-urls", backend_url, "--policy", "round_robin", "--log-level", "error"]
    command += ["--prometheus-port", str(metrics_port)]
    environ = {**os.environ, "PYTHONPATH": str(path)}
    process = await asyncio.create_subprocess_exec(*command, env=environ, stdout=subprocess.DEVNULL)
    try:
        await answering(f"http://127.0.0.1:{port}/health")
        yield Target("vllm-router", port, process.pid, "sim")
    finally:
        process.terminate()
        await process.wait()
        ticking.cancel()
        backend.close()


async def answering(url: str, timeout_s: float = 60.0) -> None:
    """Wait for a 200."""
    async with asyncio.timeout(timeout_s), httpx.AsyncClient(trust_env=False) as http:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await http.get(url)).is_success:
                    return
            await asyncio.sleep(0.02)


async def start_s(cluster: Cluster) -> float:
    """Start a second gateway on the same cluster; returns the time until it is ready for requests."""
    port, environ = free_port(), environ_of(cluster.pids["gateway-0"])
    own = {
        "INFERFLUX_HTTP_PORT": str(port),
        "INFERFLUX_INSTANCE_ID": "gateway-9",
        "INFERFLUX_OPS_ADDRESS": "127.0.0.1:0",
    }
    started_at = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.gateway",
        env=environ | own,
        stderr=subprocess.DEVNULL,
    )
    try:
        await answering(f"http://127.0.0.1:{port}/readyz")
        return time.perf_counter() - started_at
    finally:
        process.terminate()
        await process.wait()


def show(results: Sequence[Result]) -> None:
    print(f"{'':28}{'streams':>8}{'requests':>10}{'CPU ms/request':>16}{'CPU us/event':>14}")
    for r in results:
        print(f"{r.target:28}{r.streams:8}{r.requests:10}{r.cpu_ms_per_request:16.2f}{r.cpu_us_per_event:14.1f}")


async def run(arguments: argparse.Namespace, note: Callable[[str], None]) -> dict[str, object]:
    streams = [int(number) for number in arguments.streams.split(",")]
    results: list[Result] = []
    facts: dict[str, float] = {}

    async def measure_all(target: Target) -> None:
        for number in streams:
            results.append(
                await measure(target, number, arguments.requests if number > 1 else arguments.requests // 16)
            )
            note(f"{target.name}, {number} streams: {results[-1].cpu_ms_per_request:.2f} ms per request")

    for num_prefill in (0, 1):
        with inferflux(num_prefill) as (target, cluster):
            facts["gateway_idle_rss_mb"] = rss_mb(target.pid)
            await measure_all(target)
            facts["gateway_rss_mb"] = rss_mb(target.pid)
            facts["gateway_start_s"] = await start_s(cluster)
    peer = None if arguments.no_peer else installed_peer()
    if peer is not None:
        async with vllm_router(peer) as target:
            await measure_all(target)
    return {"tokens": NUM_TOKENS, "step_s": STEP_S, "results": [asdict(r) for r in results], **facts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="1,16,64")
    parser.add_argument("--requests", type=int, default=512, help="per measurement; a 16th of it with one stream")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = uvloop.run(run(arguments, lambda text: print(text, file=sys.stderr)))
    show([Result(**r) for r in report["results"]])
    print(f"goal at 64 streams: at most {GOAL_MS} ms per request; vllm-router publishes 17-20 us per event")
    print({key: round(value, 2) for key, value in report.items() if isinstance(value, float)})
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
