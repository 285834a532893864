"""The reference pages say what the code says: each metric, setting, flag and error reason, and nothing that is gone."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import typer.main
from prometheus_client.metrics import MetricWrapperBase

import inferflux.cli
import services
from inferflux import errors
from inferflux.cli.main import app
from inferflux.config import FILE_SUFFIX, CommonSettings, env_name
from inferflux.errors import InferfluxError
from inferflux.telemetry import metrics
from inferflux.telemetry.tally import TallyHistogram
from services.gateway.endpoints import ENDPOINTS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*DOCS.rglob("*.md"), *ROOT.glob("*.md"), ROOT / "bench" / "README.md"]
VARIABLE = re.compile(r"\b(?:INFERFLUX|INFERCTL|OTEL)_[A-Z][A-Z_]*[A-Z]\b")
TITLES = {"inferflux.worker": "Workers", "services.gateway": "Gateway"}
TITLES |= {"services.policy": "Policy", "services.registry": "Registry"}
TITLES |= {"services.guardrails": "Guardrail workers"}
EXAMPLES = {"INFERFLUX_FOO_BAR", "INFERFLUX_FOO_BAR_FILE"}


def rows(text: str) -> dict[str, list[str]]:
    """Read the tables of a page: first cell, without backticks, to the others."""
    cells = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    return {row[0].strip("`"): row[1:] for row in cells}


def sections(text: str) -> dict[str, str]:
    """Split a page at its headings, of any level."""
    parts = re.split(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def page(name: str) -> str:
    return (DOCS / name).read_text()


def metric_rows() -> dict[str, list[str]]:
    """Each metric of ours as its row: kind and labels, under the name that Prometheus sees."""
    found = {}
    for collector in vars(metrics).values():
        if isinstance(collector, MetricWrapperBase | TallyHistogram):
            family = next(iter(collector.collect()))
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels = getattr(collector, "_labelnames", None) or getattr(collector, "_label", ())
            labels = (labels,) if isinstance(labels, str) else labels
            found[name] = [family.type, ", ".join(f"`{label}`" for label in labels)]
    return found


def import_all() -> None:
    """Import every service and the command line: classes know only the subclasses that are imported."""
    for package in (services, inferflux.cli):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


def settings() -> Iterator[tuple[str, type[CommonSettings]]]:
    """Each service's settings, under the title of their section."""
    import_all()
    for cls in leaves(CommonSettings):
        package = ".".join(cls.__module__.split(".")[:2])
        if package in TITLES:
            yield TITLES[package], cls


def leaves(cls: type) -> list[type]:
    """Subclasses that nobody subclasses."""
    below = [leaf for sub in cls.__subclasses__() for leaf in leaves(sub)]
    return below or [cls]


def defaults(cls: type[CommonSettings]) -> dict[str, str]:
    """Environment variable -> default as the pages write it."""
    return {env_name(f.name): written(f.default) for f in dataclasses.fields(cls) if f.init}


def written(default: object) -> str:
    if default is dataclasses.MISSING:
        return "required"
    if default in ("", None, (), Path()):
        return ""
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return str(default).lower() if isinstance(default, bool) else str(default)


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """A command that does something, and all below it, by what one types."""
    below = getattr(command, "commands", {})
    if not below or command.invoke_without_command:
        yield path, command
    for name, sub in below.items():
        if not sub.hidden:
            yield from commands(sub, f"{path} {name}")


def flags(command: Any) -> list[str]:
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    return [name for option in options for name in (*option.opts, *option.secondary_opts) if name != "--help"]


def error_classes(cls: type[InferfluxError] = InferfluxError) -> list[type[InferfluxError]]:
    return [cls, *(below for sub in cls.__subclasses__() for below in error_classes(sub))]


def variables_in(root: str) -> set[str]:
    return {v for file in (ROOT / root).rglob("*.py") for v in VARIABLE.findall(file.read_text())}


def test_every_metric_is_documented() -> None:
    """docs/metrics.md has each metric with its kind and labels, and no others."""
    documented = {name: cells[:2] for name, cells in rows(page("metrics.md")).items() if name.startswith("inferflux_")}

    assert metric_rows() == documented


def test_every_setting_is_documented() -> None:
    """docs/configuration.md has each setting of each service with its default."""
    by_title = {title: rows(text) for title, text in sections(page("configuration.md")).items()}
    found = list(settings())

    assert {title for title, _ in found} == set(TITLES.values())
    for title, cls in found:
        for variable, default in defaults(cls).items():
            row = by_title[title].get(variable) or by_title["Every process"].get(variable)
            assert row is not None, f"{variable} of {title} is not in docs/configuration.md"
            assert row[0].strip("`") in (default, "required"), f"{variable} of {title}: default is {default!r}"


def test_every_variable_is_documented() -> None:
    """Variables named anywhere in the code are in docs/configuration.md, and those of the pages exist."""
    known = {name + suffix for _, cls in settings() for name in defaults(cls) for suffix in ("", FILE_SUFFIX)}
    literal = (variables_in("inferflux") | variables_in("services")) - EXAMPLES
    documented = set(VARIABLE.findall(page("configuration.md")))

    assert literal <= documented
    from_files = {f"{variable}_FILE" for variable in known}
    deployed = {v for file in (ROOT / "deploy").rglob("*.y*ml") for v in VARIABLE.findall(file.read_text())}
    pages = {v for file in PAGES for v in VARIABLE.findall(file.read_text())}
    assert pages <= known | literal | from_files | deployed


def test_every_flag_is_documented() -> None:
    """docs/cli.md has a section for each command, with each of its flags."""
    by_title = sections(page("cli.md"))
    found = dict(commands(typer.main.get_command(app), "inferctl"))

    assert {f"`{name}`" for name in found} == {title for title in by_title if title.startswith("`inferctl")}
    for name, command in found.items():
        missing = [flag for flag in flags(command) if f"`{flag}" not in by_title[f"`{name}`"]]
        assert not missing, f"{name}: {missing}"


def test_every_error_is_documented() -> None:
    """docs/errors.md has each reason with its HTTP status, gRPC code and whether to try again."""
    import_all()
    table = rows(page("errors.md"))

    for cls in error_classes():
        retry = "yes" if cls.is_retryable else "no"
        assert table[cls.reason][:3] == [str(cls.http_status), cls.grpc_code.name, retry], cls.reason
    reasons = {cls.reason for cls in error_classes()}
    assert {name for name in table if re.fullmatch(r"[A-Z]+(_[A-Z]+)*", name)} == reasons


def test_every_path_is_documented() -> None:
    """docs/http.md has each inference path and how it is served."""
    kinds = {
        "generate": "prefill and decode",
        "pooling": "one call to a pooling worker",
        "utility": "one call to a worker of the model",
    }
    table = rows(page("http.md"))

    for path, endpoint in ENDPOINTS.items():
        assert table[path][0].startswith(kinds[endpoint.kind]), path


def test_the_error_tree_is_drawn() -> None:
    """The drawing in inferflux/errors.py shows each class."""
    missing = [cls.__name__ for cls in error_classes() if cls.__name__ not in str(errors.__doc__)]

    assert [name for name in missing if getattr(errors, name, None)] == []


def test_links_lead_somewhere() -> None:
    """Relative links of the pages point at files."""
    links = [(file, link) for file in PAGES for link in re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text())]

    assert [f"{f.name}: {link}" for f, link in links if not (f.parent / link).exists()] == []


def test_the_walk_names_real_code() -> None:
    """Paths in docs/walk.md exist, and so do the functions and classes it names in them."""
    references = re.findall(r"`((?:inferflux|services)/[\w/]+\.py)(?:: ([\w.]+))?`", page("walk.md"))

    assert references
    for path, name in references:
        defined = re.findall(r"^\s*(?:async def|def|class) (\w+)", (ROOT / path).read_text(), flags=re.MULTILINE)
        assert set(filter(None, name.split("."))) <= set(defined), f"{path}: {name}"


def test_make_targets_are_real() -> None:
    """Make targets that the pages name exist."""
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {t for file in PAGES for t in re.findall(r"(?:`|^)make ([a-z0-9-]+)", file.read_text(), flags=re.MULTILINE)}

    assert named <= targets


def test_entry_points_exist() -> None:
    """Console scripts name functions that import, without an engine in sight."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    for name, value in project["scripts"].items():
        assert callable(EntryPoint(name, value, "console_scripts").load())


@pytest.mark.parametrize("module", ["services.gateway.__main__", "services.policy.__main__", "inferflux.cli.main"])
def test_light_processes_stay_light(module: str) -> None:
    """The gateway, the control plane and the command line never import an engine."""
    code = f"import {module}, sys; print(sorted({{'torch', 'vllm', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)

    assert done.stdout.strip() == "[]"


def test_import_contracts_hold() -> None:
    """`lint-imports` finds no broken contract."""
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)

    assert done.returncode == 0, done.stdout
