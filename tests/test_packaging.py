"""The wheel, installed into an empty environment outside the repository."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import venv
import zipfile

import pytest
from test_tidy import ROOT

SHARED = (
    "grafana/engram.json",
    "kubernetes/daemonset.yaml",
    "kubernetes/pod.yaml",
    "operations.md",
    "prometheus/alerts.yml",
    "systemd/engram.service",
)


def run(*command, **options):
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        **options,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, so that building leaves nothing in the tree; links are followed by git's own rules.
    source = folder / "source"
    listed = run("git", "ls-files", "-z", cwd=ROOT).stdout.split("\0")
    for name in filter(None, listed):
        path, target = ROOT / name, source / name
        if not path.exists() and not path.is_symlink():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            target.symlink_to(os.readlink(path))
        else:
            target.write_bytes(path.read_bytes())
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, source)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Interpreter of a fresh environment that holds the wheel and what it requires, no torch."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    interpreter = folder / "bin" / "python"
    run(interpreter, "-m", "pip", "install", "--quiet", wheel)
    return interpreter


def test_one_import_package_and_nothing_beside_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith((".dist-info", ".data"))} == {"engram"}
    shared = {name.partition(".data/data/")[2] for name in names if ".data/" in name}
    assert shared == {f"share/engram/{name}" for name in SHARED}
    assert "engram/py.typed" in names
    assert not [name for name in names if "test" in name]


def test_every_module_imports_without_the_repository(python, tmp_path):
    script = """
import importlib, importlib.util, pkgutil
import engram
for top in ("proto", "store", "service"):
    assert importlib.util.find_spec(top) is None, top
assert importlib.util.find_spec("torch") is None
count = 0
for module in pkgutil.walk_packages(engram.__path__, "engram."):
    if module.name.split(".")[1] in ("nn", "gpu", "integrations", "__main__"):
        continue
    if module.name == "engram.torture.gpu_client":
        continue
    importlib.import_module(module.name)
    count += 1
for name in engram.__all__:
    getattr(engram, name)
print(count)
"""
    done = run(python, "-W", "ignore", "-c", script, cwd=tmp_path)
    assert int(done.stdout) > 40


def test_model_code_says_what_it_needs(python, tmp_path):
    done = subprocess.run(
        [python, "-c", "import engram.nn"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 1
    assert "engram-offload[torch]" in done.stderr


def test_the_sidecar_runs_without_torch(python, tmp_path):
    engram = python.parent / "engram"
    run(engram, "synth", "t", "--family", "qwen4-exp", "--vocab-size", "600", cwd=tmp_path)
    process = subprocess.Popen(
        [engram, "serve", "--table", "t=t", "--listen", "unix:s.sock"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert "ready" in process.stderr.readline()
        script = """
import engram
with engram.connect("unix:s.sock") as remote, engram.open("t") as local:
    print((remote.lookup([1, 2, 3]).values == local.lookup([1, 2, 3]).values).all())
"""
        assert run(python, "-c", script, cwd=tmp_path).stdout.strip() == "True"
    finally:
        process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
