"""Nothing of ours loads what could run: no pickles, no eval, no shell, no code that comes with a model."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for root in ("inferflux", "services", "bench", "scripts") for path in (ROOT / root).rglob("*.py"))
MODULES = frozenset({"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"})
CALLS = frozenset({
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.hub.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "numpy.load", "np.load", "pandas.read_pickle"),
    *("tempfile.mktemp", "asyncio.create_subprocess_shell"),
})  # fmt: skip
FLAGS = {"shell": True, "trust_remote_code": True, "allow_pickle": True, "weights_only": False, "verify": False}


def findings(tree: ast.AST) -> Iterator[str]:
    """What a tree does that it must not, with its line."""
    for node in ast.walk(tree):
        for what in _imports(node) if isinstance(node, ast.Import | ast.ImportFrom) else _calls(node):
            yield f"line {node.lineno}: {what}"


def _imports(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    yield from (f"import {name}" for name in names if name.partition(".")[0] in MODULES)


def _calls(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Call):
        if (name := ast.unparse(node.func)) in CALLS:
            yield name
        for keyword in node.keywords:
            value = keyword.value
            if keyword.arg in FLAGS and isinstance(value, ast.Constant) and value.value is FLAGS[keyword.arg]:
                yield f"{keyword.arg}={value.value}"
    elif isinstance(node, ast.Constant) and node.value in ("--trust-remote-code", "--trust_remote_code"):
        yield str(node.value)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_our_code_is_clean(path):
    """Each file by itself."""
    assert list(findings(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import dill as d",
        "eval(text)",
        "torch.load(path)",
        "yaml.load(text)",
        "numpy.load(path)",
        "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "line += ['--trust-remote-code']",
        "httpx.get(url, verify=False)",
        "os.system(command)",
    ],
)
def test_the_scan_finds(line):
    """Otherwise its silence would mean nothing."""
    assert len(list(findings(ast.parse(line)))) == 1
