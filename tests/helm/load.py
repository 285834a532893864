"""Clients that never stop, in a pod: says what it has seen when it is told to end. Standard library only."""

import http.client
import itertools
import json
import os
import random
import signal
import sys
import threading
import time

HOST, PORT = os.environ["LOAD_HOST"], int(os.environ["LOAD_PORT"])
NUM_CLIENTS = int(os.environ.get("LOAD_CLIENTS", "4"))
TIMEOUT_S = 60
STOP = threading.Event()
COUNTS = {"ok": 0, "failed": 0}
FAILURES: list[str] = []
GAPS: list[float] = []
LOCK = threading.Lock()
SERIAL = itertools.count()


def generate() -> int:
    """Stream one completion from its first byte to its end; returns how many events it had. Raises on any other end."""
    words = " ".join(random.choice("abcdefgh") * 5 for _ in range(60))
    body = {"model": os.environ["LOAD_MODEL"], "prompt": f"{next(SERIAL)} {words}", "max_tokens": 40, "stream": True}
    connection = http.client.HTTPConnection(HOST, PORT, timeout=TIMEOUT_S)
    try:
        headers = {"authorization": f"Bearer {os.environ['LOAD_KEY']}", "content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {response.read()[:300]!r}")
        return follow(response)
    finally:
        connection.close()


def follow(response: http.client.HTTPResponse) -> int:
    """Read server-sent events to their end."""
    num_events, finish, at = 0, None, time.monotonic()
    for line in response:
        if not line.startswith(b"data: "):
            continue
        now = time.monotonic()
        GAPS.append(now - at)
        at = now
        if line.strip() == b"data: [DONE]":
            if finish is None:
                raise RuntimeError("done without a finish reason")
            return num_events
        event = json.loads(line[6:])
        if "error" in event:
            raise RuntimeError(f"error in the stream: {event['error']}")
        num_events += 1
        finish = finish or event["choices"][0]["finish_reason"]
    raise RuntimeError(f"the stream ended after {num_events} events")


def client() -> None:
    """Send one request after the other."""
    while not STOP.is_set():
        try:
            generate()
        except Exception as e:  # noqa: BLE001  -- whatever it is, it is a failed request
            with LOCK:
                COUNTS["failed"] += 1
                FAILURES.append(f"{time.strftime('%X')} {type(e).__name__}: {e}")
                print(f"FAILED {FAILURES[-1]}", flush=True)
        else:
            with LOCK:
                COUNTS["ok"] += 1
        STOP.wait(0.05)


def main() -> None:
    """Run until SIGTERM; finish what runs, then print a summary as the last line."""
    signal.signal(signal.SIGTERM, lambda *_: STOP.set())
    clients = [threading.Thread(target=client) for _ in range(NUM_CLIENTS)]
    for thread in clients:
        thread.start()
    while not STOP.wait(1):
        print(f"progress {COUNTS['ok']} {COUNTS['failed']}", flush=True)
    for thread in clients:
        thread.join()
    summary = COUNTS | {"longest_gap_s": round(max(GAPS, default=0), 2), "failures": FAILURES[:10]}
    print(json.dumps(summary), flush=True)
    sys.exit(1 if COUNTS["failed"] else 0)


main()
