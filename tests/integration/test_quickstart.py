"""`inferctl quickstart` with simulated engines: the real console entry point, real processes, nothing in between."""

from __future__ import annotations

import json
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from inferflux.cli.failure import Exit
from inferflux.paths import Home
from tests.support.cluster import (
    INFERCTL,
    Cluster,
    assert_nothing_runs,
    environment,
    inferctl,
    launch,
    new_home,
    poll,
    processes_of,
    read_document,
)
from tests.support.redis_server import RedisServer

# Several starts of a whole cluster in one test, on a machine that may be busy.
pytestmark = pytest.mark.timeout(180)
ROLES = ["redis", "policy", "registry", "prefill", "decode", "gateway"]
QUICKSTART = ("quickstart", "--engine", "sim", "--port", "0", "-o", "json")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One cluster for the tests that leave it as they found it."""
    with Cluster.start() as cluster:
        yield cluster


@pytest.fixture
def home() -> Iterator[Path]:
    """A home of one test, in which nothing runs afterwards."""
    home = new_home()
    yield home
    assert_nothing_runs(home)
    shutil.rmtree(home)


def test_status_shows_every_process(cluster):
    """Status names each process with id, incarnation, pid and readiness."""
    result = cluster.inferctl("status", "-o", "json")
    processes = json.loads(result.stdout)["processes"]

    assert [p["role"] for p in processes] == ROLES
    assert all(p["ready"] and p["running"] and p["incarnation"] and p["reason"] == "" for p in processes)
    assert {p["pid"] for p in processes} <= processes_of(cluster.home).keys()
    assert "decode-0" in cluster.inferctl("status").stdout


def test_models_is_what_the_api_answers(cluster):
    """`models -o json` prints /v1/models."""
    answer = httpx.get(f"{cluster.url}/v1/models", headers=cluster.headers).json()

    assert json.loads(cluster.inferctl("models", "-o", "json").stdout) == answer
    assert cluster.model in cluster.inferctl("models").stdout


def test_chat_and_completion_answer(cluster):
    """Streamed, whole and as JSON, an answer is the same text."""
    chat = ("chat", "Hello", "--max-tokens", "8", "--temperature", "0")
    streamed, whole = cluster.inferctl(*chat), cluster.inferctl(*chat, "--no-stream")
    document = json.loads(cluster.inferctl(*chat, "-o", "json").stdout)

    assert streamed.returncode == 0
    assert streamed.stdout == whole.stdout == document["choices"][0]["message"]["content"] + "\n"
    assert cluster.inferctl("completion", "Once", "--max-tokens", "3").stdout.strip()


def test_prefill_computed_and_decode_continued(cluster):
    """The answer came by ticket: KV bytes moved between two workers."""
    cluster.inferctl("chat", "Tell me something long enough to fill a block " * 20, "--max-tokens", "4")

    moved = [
        line for line in cluster.metrics("decode").splitlines() if line.startswith("inferflux_kv_transfer_bytes_total")
    ]
    assert sum(float(line.split()[-1]) for line in moved) > 0


def test_a_bad_key_is_exit_status_4(cluster):
    """Without a key, or with a wrong one, the exit status says so."""
    for key in ("", "ifx_wrong"):
        assert cluster.inferctl("chat", "Hello", key=key).returncode == Exit.AUTH


@pytest.mark.parametrize("way", [[], ["--local"]])
def test_keys_are_created_listed_and_revoked(cluster, way):
    """Over HTTP and with the operator's certificate, a new key works until it is revoked."""
    keys = ("admin", "api-keys")
    created = json.loads(
        cluster.inferctl(*keys, "create", "mine", "--scope", "generate", "--scope", "read", *way, "-o", "json").stdout
    )
    listed = json.loads(cluster.inferctl(*keys, "list", *way, "-o", "json").stdout)["data"]

    def is_known() -> bool:
        return cluster.inferctl("models", key=created["secret"]).returncode == 0

    assert created["id"] in [key["id"] for key in listed]
    assert created["secret"] not in json.dumps(listed)
    poll(is_known, 5.0, "the key does not work")
    assert cluster.inferctl(*keys, "revoke", created["id"], *way).returncode == 0
    poll(lambda: not is_known(), 5.0, "the key still works")


def test_a_second_quickstart_says_what_runs(cluster):
    """It changes nothing, whatever its options, and is no failure."""
    before = cluster.pids
    document = json.loads(inferctl(cluster.home, *QUICKSTART).stdout)
    text = inferctl(cluster.home, "quickstart", "--decode", "3")

    assert (document["already_running"], document["url"]) == (True, cluster.url)
    assert (text.returncode, "already running" in text.stderr) == (0, True)
    assert cluster.pids == before


def test_a_port_in_use_is_one_line(cluster, home):
    """Another home's cluster can't have the same port; nothing is started."""
    port = cluster.url.rpartition(":")[2]
    result = inferctl(home, "quickstart", "--engine", "sim", "--port", port)

    assert result.returncode == Exit.FAILED
    assert f"port {port} on 127.0.0.1 is in use" in result.stderr


@pytest.mark.parametrize("role", ROLES)
def test_a_killed_process_comes_back(cluster, role):
    """SIGKILL of any process is answered with a new incarnation, and the cluster answers again."""
    after = cluster.wait_restarted(cluster.kill(role))
    cluster.wait_ready()

    assert after["restarts"] >= 1
    assert after["last_exit"] == "was killed by SIGKILL"
    assert cluster.inferctl("chat", "Hello", "--max-tokens", "2").returncode == 0


def test_a_role_can_be_restarted(cluster):
    """A restart drains, is not counted as a death, and ends with a ready new incarnation."""
    before = cluster.process("prefill")
    result = cluster.inferctl("server", "restart", "prefill", "-o", "json")
    after = cluster.process("prefill")

    assert json.loads(result.stdout) == {"restarted": ["prefill-0"]}
    assert after["ready"]
    assert after["incarnation"] > before["incarnation"]
    assert after["restarts"] == before["restarts"]
    assert cluster.inferctl("server", "restart", "nobody").returncode == Exit.USAGE


def test_logs_are_shown(cluster):
    """Logs can be read per role, and no log has a key or a prompt in it."""
    cluster.inferctl("chat", "xylophone-marmalade", "--max-tokens", "2")
    everything = cluster.inferctl("server", "logs", "-n", "100000").stdout

    assert "gateway-0" in cluster.inferctl("server", "logs", "gateway").stdout
    assert cluster.api_key not in everything
    assert "xylophone-marmalade" not in everything


def test_the_home_is_private(cluster):
    """Nobody else can read the home, its keys or its sockets."""
    home = Home(cluster.home)
    for path in (home.pki, home.secrets, home.run, home.logs, home.redis):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    assert stat.S_IMODE(home.supervisor_socket.stat().st_mode) == 0o600


def test_detach_stop_and_start_again(home):
    """A detached cluster outlives its inferctl, stops completely, and starts again with its options and keys."""
    first = json.loads(inferctl(home, *QUICKSTART, "--decode", "2", "--detach").stdout)
    assert first["api_key"]
    assert inferctl(home, "server", "status").returncode == 0
    assert inferctl(home, "server", "stop").returncode == 0
    assert not processes_of(home)
    assert inferctl(home, "server", "status").returncode == Exit.NOT_RUNNING

    again = json.loads(inferctl(home, "server", "start", "-o", "json").stdout)
    assert again["api_key"] is None
    assert again["url"] == first["url"]
    assert [p["id"] for p in again["processes"]].count("decode-1") == 1
    assert inferctl(home, "models", INFERCTL_API_KEY=first["api_key"]).returncode == 0
    assert inferctl(home, "server", "stop").returncode == 0


def test_a_killed_supervisor_leaves_nothing(home):
    """SIGKILL of the supervisor ends all its processes, and the next quickstart finds its way over what is left."""
    cluster = Cluster.start(home=home)
    cluster.kill("supervisor")
    cluster.inferctl_process.communicate(timeout=30)
    assert cluster.inferctl_process.returncode == Exit.FAILED
    assert_nothing_runs(home)

    again = json.loads(inferctl(home, *QUICKSTART, "--detach").stdout)
    assert again["api_key"] is None
    assert inferctl(home, "chat", "Hello", INFERCTL_API_KEY=cluster.api_key).returncode == 0
    assert inferctl(home, "server", "stop").returncode == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_the_foreground_takes_all_with_it(home, signum):
    """Ctrl-C, a closed terminal, even SIGKILL of the inferctl in the foreground: the cluster ends."""
    cluster = Cluster.start(home=home)
    cluster.inferctl_process.send_signal(signum)
    _, errors = cluster.inferctl_process.communicate(timeout=60)

    assert_nothing_runs(home, 30.0)
    if signum != signal.SIGKILL:
        assert cluster.inferctl_process.returncode == 0
        assert errors.rstrip().endswith("stopped")


def test_an_interrupted_start_leaves_nothing(home):
    """Ctrl-C while the processes start stops them again."""
    process = launch(home, QUICKSTART)
    poll(lambda: len(processes_of(home)) > 2, 30.0, "nothing starts")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)

    assert process.returncode == Exit.INTERRUPTED
    assert_nothing_runs(home)


def test_two_quickstarts_at_once_make_one_cluster(home):
    """Of two that start at the same time one wins, and nothing runs twice."""
    both = [launch(home, (*QUICKSTART, "--detach")) for _ in range(2)]
    codes = []
    for process in both:
        process.communicate(timeout=60)
        codes.append(process.returncode)

    assert Exit.OK in codes
    supervisors = [command for command in processes_of(home).values() if "inferflux.cli.supervisor" in command]
    assert len(supervisors) == 1
    assert inferctl(home, "server", "stop").returncode == 0


def test_own_api_keys(home):
    """With INFERFLUX_API_KEYS these keys work, and none is created."""
    with Cluster.start(home=home, env={"INFERFLUX_API_KEYS": "my-own-secret:generate+read"}) as cluster:
        assert cluster.api_key == ""
        assert cluster.inferctl("models", key="my-own-secret").returncode == 0
        names = [
            key["name"]
            for key in json.loads(cluster.inferctl("admin", "api-keys", "list", "--local", "-o", "json").stdout)["data"]
        ]
        assert "quickstart" not in names
    home.mkdir()


def test_what_is_missing_is_one_line(home):
    """No memory, no such model, a worker that can't start: one clear line, exit status 1, and nothing runs."""
    cases = [
        (["--engine", "sim"], {"INFERFLUX_KV_ARENA_BYTES": str(1 << 50)}, "not enough memory"),
        (["--model", "no-such-model"], {"INFERFLUX_MODELS": str(home / "models")}, "no model 'no-such-model'"),
        (["--engine", "sim"], {"INFERFLUX_MAX_NUM_SEQS": "many"}, "INFERFLUX_MAX_NUM_SEQS"),
    ]
    for options, env, complaint in cases:
        result = inferctl(home, "quickstart", "--port", "0", *options, **env)
        failures = [line for line in result.stderr.splitlines() if line.startswith("inferctl: ")]

        assert result.returncode == Exit.FAILED
        assert len(failures) == 1
        assert complaint in failures[0]
        assert_nothing_runs(home)


def test_an_outside_redis_is_used(home):
    """With INFERFLUX_REDIS_URL no server is started here."""
    with RedisServer() as outside:
        process = launch(home, QUICKSTART, {"INFERFLUX_REDIS_URL": outside.url})
        document = read_document(process, 60.0)
        assert "redis" not in [p["role"] for p in document["processes"]]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def test_conversation_keeps_its_history(cluster):
    """`chat --interactive` sends the whole conversation; /exit ends it."""
    result = converse(cluster, "Hello\nAnd more\n/reset\nHello\n/exit\n")
    answers = [line for line in result.replace("> ", "").splitlines() if line.strip()]

    assert len(answers) == 3
    assert answers[0] == answers[2] != answers[1]


def converse(cluster: Cluster, typed: str) -> str:
    """Type into an interactive chat; returns what it prints."""
    result = subprocess.run(
        [INFERCTL, "chat", "--interactive", "--max-tokens", "4", "--temperature", "0"],
        env=environment(cluster.home, {"INFERCTL_API_KEY": cluster.api_key}),
        input=typed,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return result.stdout
