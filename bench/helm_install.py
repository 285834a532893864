"""How long a cold `helm install` takes to the first token, against the slowest container's own start-up.

    python -m bench.helm_install [--model-dir ~/.cache/inferflux/models/smollm2-135m]

Installs the chart on the cluster of the tests, which starts pods as processes of this machine; needs root and
`make test-tools`. Without a model its workers simulate. No images are pulled and no nodes made: this is what the chart
and the programs add to the start-up of one container, from its process to its readiness.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.helm.cluster import CHART, CLAIM, Cluster, cluster

GOAL = 1.3
RELEASE = "t"
FULL = f"{RELEASE}-inferflux"
TIMEOUT_S = 300.0
POLL_S = 0.05
WORKER = {"replicas": 1, "kvCacheBytes": 256 << 20, "resources": {"limits": {"memory": "8Gi"}}}


@dataclass(slots=True)
class Starts:
    """When each pod was first seen, its container ran, and it was ready: seconds of the monotonic clock."""

    created: dict[str, float] = field(default_factory=dict)
    running: dict[str, float] = field(default_factory=dict)
    ready: dict[str, float] = field(default_factory=dict)

    def see(self, pod: Any) -> None:
        """Note what is new of a pod."""
        now, name = time.monotonic(), pod.metadata.name
        self.created.setdefault(name, now)
        if any(c.state.running for c in pod.status.container_statuses or ()):
            self.running.setdefault(name, now)
        if any(c.type == "Ready" and c.status == "True" for c in pod.status.conditions or ()):
            self.ready.setdefault(name, now)

    def startups_s(self) -> dict[str, float]:
        """From the container's start to the pod's readiness, by pod."""
        return {name: ready - self.running[name] for name, ready in self.ready.items()}


@dataclass(frozen=True, slots=True)
class Result:
    """One install, in seconds from the call of helm."""

    pods_made_s: float
    all_ready_s: float
    first_token_s: float
    slowest_pod: str
    slowest_startup_s: float

    @property
    def ratio(self) -> float:
        """To the goal of 1.3."""
        return self.first_token_s / self.slowest_startup_s


@contextmanager
def watching(kube: Cluster) -> Iterator[Starts]:
    """Follow the namespace's pods, in a thread."""
    from kubernetes import client, config, watch  # noqa: PLC0415 - heavy

    starts, watcher = Starts(), watch.Watch()
    api_client = config.new_client_from_config(str(kube.kubeconfig))
    api = client.CoreV1Api(api_client)

    def follow() -> None:
        while not stopped.is_set():
            for event in watcher.stream(api.list_namespaced_pod, kube.namespace, timeout_seconds=5):
                starts.see(event["object"])

    stopped, thread = threading.Event(), threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield starts
    finally:
        stopped.set()
        watcher.stop()
        thread.join(10)
        api_client.close()


def first_token(url: str, key: str, model: str, deadline_at: float) -> float:
    """Ask until a token comes; returns when it came. Raises TimeoutError."""
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 8, "stream": True}
    headers = {"authorization": f"Bearer {key}"}
    answer = "nothing"
    while time.monotonic() < deadline_at:
        try:
            with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=30) as response:
                if response.status_code == 200 and any(line.startswith("data: {") for line in response.iter_lines()):
                    return time.monotonic()
                answer = f"status {response.status_code}"
        except httpx.HTTPError as e:
            answer = str(e)
        time.sleep(POLL_S)
    raise TimeoutError(f"no token within {TIMEOUT_S:g} s, the last answer was: {answer}")


def install(kube: Cluster, values: dict[str, Any], model: str) -> Result:
    """Install the chart, and ask for a token from the moment on that there is somebody to ask."""
    kube.apply(CLAIM)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file, watching(kube) as starts:
        yaml.safe_dump(values, file)
        file.flush()
        names = [CHART / "values-laptop.yaml", CHART / "ci" / "sim-values.yaml", file.name]
        options = [part for name in names for part in ("--values", str(name))]
        began_at = time.monotonic()
        kube.helm("install", RELEASE, str(CHART), *options)
        service = kube.get("service", FULL)["spec"]["clusterIP"]
        key = b64decode(kube.get("secret", f"{FULL}-api-keys")["data"]["key"]).decode()
        token_at = first_token(f"http://{service}", key, model, began_at + TIMEOUT_S)
        startups_s = dict(sorted(starts.startups_s().items(), key=lambda item: item[1]))
    show_pods(starts, began_at)
    slowest = list(startups_s)[-1]
    return Result(
        pods_made_s=min(starts.created.values()) - began_at,
        all_ready_s=max(starts.ready.values()) - began_at,
        first_token_s=token_at - began_at,
        slowest_pod=slowest,
        slowest_startup_s=startups_s[slowest],
    )


def values_of(model_dir: Path | None) -> tuple[dict[str, Any], str]:
    """The values of one pool, and its model's name."""
    if model_dir is None:
        return {}, "sim-model"
    pool = {
        "name": "main",
        "model": model_dir.name,
        "engine": "vllm",
        "dtype": "float32",
        "maxModelLen": 2048,
        "transport": "shm",
        "storage": {"hostPath": str(model_dir.resolve())},
        "sharedMemory": {"claim": CLAIM["metadata"]["name"]},
        "prefill": {**WORKER, "kvArenaBytes": 256 << 20},
        "decode": WORKER,
    }
    return {"pools": [pool]}, model_dir.name


def show_pods(starts: Starts, began_at: float) -> None:
    """Print when what happened to each pod."""
    print(f"{'pod':<48} {'made s':>8} {'runs s':>8} {'ready s':>8} {'start-up s':>11}")
    for name, startup_s in starts.startups_s().items():
        times = [at[name] - began_at for at in (starts.created, starts.running, starts.ready)]
        print(f"{name:<48} {times[0]:8.2f} {times[1]:8.2f} {times[2]:8.2f} {startup_s:11.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path)
    args = parser.parse_args()
    values, model = values_of(args.model_dir)
    with cluster("ifx-install") as kube:
        if args.model_dir is not None:  # a model on this machine's disk is a hostPath
            kube.kubectl(
                "label", "namespace", kube.namespace, "pod-security.kubernetes.io/enforce=privileged", "--overwrite"
            )
        result = install(kube, values, model)
    print(f"\nfirst token after {result.first_token_s:.2f} s, {result.ratio:.2f} of the slowest container's start-up")
    print(json.dumps({**asdict(result), "ratio": round(result.ratio, 3), "goal": GOAL}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
