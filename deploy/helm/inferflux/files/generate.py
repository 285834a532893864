"""What `helm test` runs: generates text with each model, and proves that KV went from a prefill to a decode worker."""

import json
import os
import sys
import time
import urllib.error
import urllib.request

URL = os.environ["INFERFLUX_TEST_URL"]
DEADLINE_AT = time.monotonic() + float(os.environ["INFERFLUX_TEST_TIMEOUT_S"])
MODELS = [name for name in os.environ["INFERFLUX_TEST_MODELS"].split(",") if name]
PROMPT = "InferFlux computes a prompt on one worker and continues it on another. " * 20


def ask(path, body=None):
    """Send a request, again while the cluster is not ready for it."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"authorization": f"Bearer {os.environ['INFERFLUX_TEST_KEY']}", "content-type": "application/json"}
    while True:
        try:
            request = urllib.request.Request(URL + path, data, headers)
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except (OSError, urllib.error.HTTPError) as e:
            is_final = isinstance(e, urllib.error.HTTPError) and e.code < 500 and e.code != 404
            if is_final or time.monotonic() > DEADLINE_AT:
                raise SystemExit(f"FAILED {path}: {e}") from e
            time.sleep(1)


def committed():
    """Count the tickets whose KV decode workers have read."""
    return sum(worker["committed"] for worker in ask("/v1/admin/tickets?limit=1")["workers"])


before = committed()
for model in MODELS:
    answer = ask("/v1/completions", {"model": model, "prompt": PROMPT, "max_tokens": 16, "temperature": 0})
    text = answer["choices"][0]["text"]
    if not text:
        sys.exit(f"FAILED {model}: empty answer")
    print(f"ok {model}: {len(text)} characters, usage {answer['usage']}")
while (read := committed() - before) < len(MODELS):
    if time.monotonic() > DEADLINE_AT:
        sys.exit(f"FAILED: {len(MODELS)} prompts, but decode workers have read {read} tickets of prefill workers")
    time.sleep(0.5)
print(f"ok: KV of {read} prompts went from prefill to decode workers")
