"""What `helm test` runs: generates text with each model, and proves that KV went from a prefill to a decode worker."""

import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

URL = os.environ["INFERFLUX_TEST_URL"]
KEY = Path(os.environ["INFERFLUX_TEST_KEY_FILE"]).read_text().strip()
DEADLINE_AT = time.monotonic() + float(os.environ["INFERFLUX_TEST_TIMEOUT_S"])
MODELS = {name for name in os.environ["INFERFLUX_TEST_MODELS"].split(",") if name}
PROMPT = "InferFlux computes a prompt on one worker and continues it on another. " * 20
RETRY_S = 0.5


def ask(path, body=None):
    """Send a request, again while the cluster is not ready for it; returns the request's id and the document."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    while True:
        try:
            request = urllib.request.Request(URL + path, data, headers)
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.headers["x-request-id"], json.load(answer)
        except (OSError, urllib.error.HTTPError) as e:
            is_final = isinstance(e, urllib.error.HTTPError) and e.code < 500 and e.code != 404
            if is_final or time.monotonic() > DEADLINE_AT:
                raise SystemExit(f"FAILED {path}: {e}") from e
            time.sleep(RETRY_S)


def ticket(request_id):
    """Find the ticket of a request that a decode worker has claimed; None when there is none."""
    _, answer = ask("/v1/admin/tickets?limit=1000")
    return next((t for t in answer["data"] if t["request_id"] == request_id and t["claimant"]), None)


def check(model):
    """Generate text until a prompt's KV has been read; at first workers may not know each other yet."""
    while time.monotonic() < DEADLINE_AT:
        request_id, answer = ask("/v1/completions", {"model": model, "prompt": PROMPT, "max_tokens": 16})
        text = answer["choices"][0]["text"]
        if not text:
            sys.exit(f"FAILED {model}: empty answer")
        if (read := ticket(request_id)) is not None:
            size = f"{read['bytes']} bytes of KV went from {read['worker']} to {read['claimant']}"
            print(f"ok {model}: {answer['usage']['completion_tokens']} tokens; {size}")
            return
        time.sleep(RETRY_S)
    sys.exit(f"FAILED {model}: no decode worker has read the KV of a prefill worker")


for name in sorted(MODELS):
    check(name)
