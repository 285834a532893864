"""helm and kubectl against the cluster of a test: the one that KUBECONFIG names, or a fake one of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferflux.cli.pdeathsig import die_with_parent
from tests.support.kube_tools import tool

REPOSITORY = Path(__file__).parents[2]
CHART = REPOSITORY / "deploy" / "helm" / "inferflux"
START_S = 30.0
STOP_S = 60.0
TIMEOUT_S = 240.0
CLAIM = {
    "apiVersion": "v1",
    "kind": "PersistentVolumeClaim",
    "metadata": {"name": "inferflux-run"},
    "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "16Mi"}}},
}
"""Where the workers of ci/sim-values.yaml share sockets."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster and a namespace in it."""

    kubeconfig: Path
    namespace: str
    is_fake: bool
    directory: Path

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return self._run("kubectl", "--namespace", self.namespace, *arguments, stdin=stdin)

    def helm(self, *arguments: str) -> str:
        return self._run("helm", *arguments, "--namespace", self.namespace)

    def apply(self, *objects: dict[str, Any]) -> str:
        return self.kubectl("apply", "--filename", "-", stdin="\n---\n".join(map(json.dumps, objects)))

    def get(self, *arguments: str) -> Any:
        """Read objects as Kubernetes has them."""
        return json.loads(self.kubectl("get", *arguments, "--output", "json"))

    def pods(self, component: str = "") -> list[Any]:
        """The pods of the release that are there, those that are leaving included."""
        selector = "app.kubernetes.io/name=inferflux"
        selector += f",app.kubernetes.io/component={component}" if component else ""
        return list(self.get("pods", "--selector", selector)["items"])

    def follow_log(self, pod: str) -> subprocess.Popen[str]:
        """Start reading a pod's output; it ends with the pod."""
        command = [str(tool("kubectl")), "--namespace", self.namespace, "logs", "--follow", pod]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=self._env, preexec_fn=die_with_parent())  # noqa: PLW1509

    @property
    def _env(self) -> dict[str, str]:
        # helm keeps caches and plugins in the user's directories; a test wants none of them.
        homes = {f"HELM_{name}_HOME": str(self.directory / "helm") for name in ("CACHE", "CONFIG", "DATA")}
        return {**os.environ, "KUBECONFIG": str(self.kubeconfig), **homes}

    def _run(self, name: str, *arguments: str, stdin: str | None = None) -> str:
        done = subprocess.run(
            [str(tool(name)), *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=self._env,
            check=False,
        )
        if done.returncode != 0:
            raise AssertionError(f"{name} {' '.join(arguments)}: {done.stdout}\n{done.stderr}")
        return done.stdout


@contextmanager
def cluster(namespace: str, real: str = "") -> Iterator[Cluster]:
    """Give a cluster with a fresh namespace that takes restricted pods only. `real`: the kubeconfig of one that is."""
    directory = Path(tempfile.mkdtemp(prefix="ifx-kube-", dir="/tmp"))
    try:
        if real:
            found = Cluster(Path(real), namespace, False, directory)
            with _namespace(found):
                yield found
        else:
            with _fake(directory):
                found = Cluster(directory / "kubeconfig", namespace, True, directory)
                with _namespace(found):
                    yield found
    finally:
        shutil.rmtree(directory)


@contextmanager
def _fake(directory: Path) -> Iterator[None]:
    """Run a fake cluster, and fail when it leaves anything running."""
    log = directory / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fake_kube", "--dir", str(directory)],
            stdout=output,
            stderr=output,
            cwd=REPOSITORY,
            preexec_fn=die_with_parent(),  # noqa: PLW1509  -- no threads here
        )
    try:
        until((directory / "kubeconfig").exists, START_S, lambda: f"no cluster: {log.read_text()}")
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(STOP_S)
        complaints = log.read_text()
        sys.stdout.write(complaints)
    assert code == 0, complaints
    assert "Traceback" not in complaints
    assert not containers(directory)


@contextmanager
def _namespace(found: Cluster) -> Iterator[None]:
    found.kubectl("create", "namespace", found.namespace)
    found.kubectl("label", "namespace", found.namespace, "pod-security.kubernetes.io/enforce=restricted")
    try:
        yield
    finally:
        found.kubectl("delete", "namespace", found.namespace, "--wait=false")


def containers(directory: Path) -> dict[int, str]:
    """The processes of this machine that a fake cluster in `directory` has started: their commands by id.

    Known by their root, which lies there; an environment may be overwritten by a process's title.
    """
    found = {}
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                command = (process / "cmdline").read_bytes()
                mounts = (process / "mountinfo").read_text()
            except OSError:
                continue
            if f"={directory}/" in mounts:
                found[int(process.name)] = command.replace(b"\0", b" ").decode()
    return found


def until(condition: Callable[[], Any], timeout_s: float, why: Callable[[], str]) -> Any:
    """Wait until something is true, and return it."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, why()
        time.sleep(0.2)
    return found
