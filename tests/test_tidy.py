"""Rules of the house that a machine can check, each with its reason."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("engram", "store", "service", "proto")
FILES = sorted(
    path
    for folder in (*PACKAGES, "tests", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if not any(part.is_symlink() for part in path.parents) and "v1" not in path.parts
)

# A reader takes a file in at once, and a function without scrolling.
LINES_MAX = 400
FUNCTION_LINES_MAX = 70

# What may import what; everything else of ours is refused. Leaves know nobody.
LEAVES = {"errors", "rows", "_jit", "sizes", "_counters"}
ALLOWED = {
    **{leaf: {"errors"} for leaf in LEAVES},
    "_counters": set(),
    "_background": {"errors"},
    "_failures": {"errors"},
    "tiers": LEAVES | {"spec", "_ngrams"},
    "proto": set(),
    "store": LEAVES | {"store"},
    "spec": LEAVES | {"spec", "store"},
    "service": None,
}
NEVER_BY_ENGRAM = {"service"}
MAY_START_THE_SERVICE = {"cli"}
# The demo's model, and what checks embeddings, which others import only when asked for it.
MAY_IMPORT_TORCH = {"model.py", "gpu_client.py"}

BANNED = {
    "pickle": "rows and messages have their own formats; pickle runs code from files",
    "marshal": "as pickle",
    "time.time": "lifetimes use time.monotonic: wall clocks jump",
}


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    top = parts[0]
    if top != "engram":
        return top
    return parts[1] if len(parts) > 1 else ""


def _own_imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "engram":
                names = [f"engram.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("engram.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_read_at_once(path):
    text = path.read_text()
    assert text.count("\n") <= LINES_MAX, f"split it: over {LINES_MAX} lines"
    if path.name != "__init__.py" or text.strip():
        tree = ast.parse(text)
        assert ast.get_docstring(tree), "say in one sentence what the module is for"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                # A long list of parameters is read in passing.
                length = (node.end_lineno or 0) - node.body[0].lineno - _docstring_lines(node)
                assert length <= FUNCTION_LINES_MAX, f"{node.name} has {length} lines"


def _docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = node.body[0]
    if ast.get_docstring(node) is None:
        return 0
    return (first.end_lineno or 0) - first.lineno + 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_banned_calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = {module} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = {f"{node.value.id}.{node.attr}"}
        else:
            continue
        for name in names & BANNED.keys():
            pytest.fail(f"line {node.lineno}: {name}: {BANNED[name]}")


def _product_files() -> list[Path]:
    return [path for path in FILES if path.relative_to(ROOT).parts[0] in PACKAGES]


@pytest.mark.parametrize("path", _product_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_import_direction(path):
    module = _module(path)
    imports = _own_imports(ast.parse(path.read_text()))
    allowed = ALLOWED.get(module)
    if allowed is not None:
        assert imports <= allowed, f"{module} must not import {sorted(imports - allowed)}"
    if module not in MAY_START_THE_SERVICE | {"service"}:
        assert not imports & NEVER_BY_ENGRAM, "engram never imports the service"


@pytest.mark.parametrize("path", _product_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_model_code_imports_torch(path):
    if _module(path) in ("nn", "gpu", "integrations") or path.name in MAY_IMPORT_TORCH:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            assert not any(name.split(".")[0] in ("torch", "transformers") for name in names)


def test_every_package_is_listed():
    import tomllib

    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(config["tool"]["setuptools"]["packages"])
    found = set()
    for folder in PACKAGES:
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT).parts
            found.add(".".join(parts if parts[0] == "engram" else ("engram", *parts)))
    assert found == listed


def test_no_large_or_stray_files():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout, so there is no list of tracked files to check")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_symlink() or not path.exists():
            continue
        assert path.stat().st_size <= 1_000_000, f"{name} is over 1 MB"
        assert path.suffix not in {".pyc", ".so", ".mdb"}, name


def test_exported_names_exist():
    import engram

    assert set(engram.__all__) == set(engram._HOMES) | {"__version__"}
    for name in engram.__all__:
        assert getattr(engram, name) is not None
