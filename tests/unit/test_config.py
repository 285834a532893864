"""Settings come whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferflux import config
from inferflux.config import CommonSettings
from inferflux.errors import ConfigError
from inferflux.paths import MAX_SOCKET_PATH, Home, models_dir
from inferflux.types import Role


@dataclass(frozen=True, kw_only=True)
class Settings(CommonSettings):
    role: Role = Role.DECODE
    engine: Literal["vllm", "sim"] = "vllm"
    port: int = 8080
    ratio: float = 0.5
    verbose: bool = False
    model_dir: Path | None = None
    cpu_cores: tuple[str, ...] = ()
    max_tokens: int | None = None


def test_reads_every_supported_type_from_the_environment() -> None:
    """Each type is converted from its text."""
    environ = {
        "INFERFLUX_INSTANCE_ID": "decode-0",
        "INFERFLUX_ROLE": "prefill",
        "INFERFLUX_ENGINE": "sim",
        "INFERFLUX_PORT": "9",
        "INFERFLUX_RATIO": "0.25",
        "INFERFLUX_VERBOSE": "true",
        "INFERFLUX_MODEL_DIR": "/models/a",
        "INFERFLUX_CPU_CORES": "0, 1,",
        "INFERFLUX_MAX_TOKENS": "",
    }

    settings = config.load(Settings, environ)

    assert settings.instance_id == "decode-0"
    assert (settings.role, settings.engine) == (Role.PREFILL, "sim")
    assert (settings.port, settings.ratio, settings.verbose) == (9, 0.25, True)
    assert settings.model_dir == Path("/models/a")
    assert settings.cpu_cores == ("0", "1")
    assert settings.max_tokens is None


def test_names_every_problem_at_once() -> None:
    """One run shows all keys that are bad or missing."""
    environ = {"INFERFLUX_PORT": "x", "INFERFLUX_VERBOSE": "maybe", "INFERFLUX_ENGINE": "tgi"}

    with pytest.raises(ConfigError) as raised:
        config.load(Settings, environ)

    assert sorted(raised.value.message.splitlines()) == [
        "INFERFLUX_ENGINE: must be one of vllm, sim, is 'tgi'",
        "INFERFLUX_INSTANCE_ID: missing",
        "INFERFLUX_PORT: must be an integer, is 'x'",
        "INFERFLUX_VERBOSE: must be true or false, is 'maybe'",
    ]


def test_environment_wins_over_file_and_file_over_defaults(tmp_path: Path) -> None:
    """Precedence is environment, file, default."""
    file = tmp_path / "inferflux.toml"
    file.write_text('instance_id = "from-file"\nport = 1\nratio = 1\nverbose = true\ncpu_cores = ["2", "3"]\n')

    settings = config.load(Settings, {"INFERFLUX_PORT": "2"}, file)

    assert (settings.instance_id, settings.port, settings.ratio, settings.verbose) == ("from-file", 2, 1.0, True)
    assert settings.cpu_cores == ("2", "3")
    assert settings.engine == "vllm"


def test_file_may_hold_only_known_keys(tmp_path: Path) -> None:
    """A typo in the file is refused, with the likely word."""
    file = tmp_path / "inferflux.toml"
    file.write_text('instance_id = "a"\nprot = 1\nmodel_dir = 3\n')

    with pytest.raises(ConfigError) as raised:
        config.load(Settings, {}, file)

    assert f"{file}: unknown key 'prot'; did you mean 'port'?" in raised.value.message
    assert f"{file}: model_dir: must be text, is int" in raised.value.message


@pytest.mark.parametrize("content", [b"not toml", b"\xff\xfe", None])
def test_unreadable_file_is_a_config_error(tmp_path: Path, content: bytes | None) -> None:
    """A file that is missing, binary or not TOML is named."""
    file = tmp_path / "inferflux.toml"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(ConfigError, match=r"inferflux\.toml"):
        config.load(Settings, {"INFERFLUX_INSTANCE_ID": "a"}, file)


def test_directories_follow_home_unless_set() -> None:
    """pki, secrets and run lie under home; each may be moved."""
    environ = {"INFERFLUX_INSTANCE_ID": "a", "INFERFLUX_HOME": "~/x", "INFERFLUX_PKI_DIR": "/etc/pki"}

    settings = config.load(Settings, environ)

    home = Path("~/x").expanduser()
    assert (settings.home, settings.pki_dir) == (home, Path("/etc/pki"))
    assert (settings.secrets_dir, settings.run_dir) == (home / "secrets", home / "run")


def test_redis_url_is_not_in_the_repr() -> None:
    """A password in the URL does not get into a log by printing the settings."""
    settings = config.load(Settings, {"INFERFLUX_INSTANCE_ID": "a", "INFERFLUX_REDIS_URL": "redis://:s3cret@h/0"})

    assert "s3cret" not in repr(settings)


@given(port=st.integers(), ratio=st.floats(allow_nan=False), verbose=st.booleans())
def test_numbers_survive_their_text(port: int, ratio: float, verbose: bool) -> None:
    """Reading back what was written gives the same values."""
    environ = {
        "INFERFLUX_INSTANCE_ID": "a",
        "INFERFLUX_PORT": str(port),
        "INFERFLUX_RATIO": repr(ratio),
        "INFERFLUX_VERBOSE": str(verbose),
    }

    settings = config.load(Settings, environ)

    assert (settings.port, settings.ratio, settings.verbose) == (port, ratio, verbose)


def test_checks_of_the_dataclass_become_config_errors() -> None:
    """A ValueError of __post_init__ is reported like any other problem."""

    @dataclass(frozen=True)
    class Checked:
        port: int

        def __post_init__(self) -> None:
            if self.port < 0:
                raise ValueError("INFERFLUX_PORT: must not be negative")

    Checked.__annotations__ = {"port": int}

    with pytest.raises(ConfigError, match="must not be negative"):
        config.load(Checked, {"INFERFLUX_PORT": "-1"})


def test_home_and_models_come_from_the_environment(tmp_path: Path) -> None:
    """Both places can be moved, and all directories are private."""
    home = Home.from_env({"INFERFLUX_HOME": str(tmp_path / "home")}).ensure()
    models = models_dir({"INFERFLUX_MODELS": str(tmp_path / "models")})

    directories = [home.root, home.pki, home.secrets, home.run, home.logs, home.redis, models]
    assert [oct(directory.stat().st_mode & 0o777) for directory in directories] == ["0o700"] * 7
    assert home.supervisor_socket.parent == home.run
    assert Home.from_env({}).root == Path("~/.inferflux").expanduser()


def test_socket_addresses_that_the_kernel_would_refuse_are_refused_early() -> None:
    """A home that is too deep is a clear error, not a failed bind."""
    assert Home(Path("/h")).socket("policy") == "unix:/h/run/policy.sock"

    with pytest.raises(ConfigError, match=f"limit {MAX_SOCKET_PATH}"):
        Home(Path("/" + "h" * MAX_SOCKET_PATH)).socket("policy")


def test_a_setting_may_come_from_a_file_of_its_own(tmp_path: Path) -> None:
    """INFERFLUX_X_FILE names the file that holds INFERFLUX_X; only one of them may be set, and neither is quoted."""
    (tmp_path / "url").write_text("redis://secret@host\n")
    environ = {"INFERFLUX_INSTANCE_ID": "a", "INFERFLUX_REDIS_URL_FILE": str(tmp_path / "url")}

    assert config.load(CommonSettings, environ).redis_url == "redis://secret@host"
    with pytest.raises(ConfigError, match="INFERFLUX_REDIS_URL: set together with INFERFLUX_REDIS_URL_FILE") as caught:
        config.load(CommonSettings, environ | {"INFERFLUX_REDIS_URL": "redis://secret@host"})
    assert "secret@" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"INFERFLUX_OPS_TOKEN_FILE: .*nowhere cannot be read"):
        config.load(CommonSettings, environ | {"INFERFLUX_OPS_TOKEN_FILE": str(tmp_path / "nowhere")})
