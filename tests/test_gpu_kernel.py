"""The gather kernel gives the same bits as its twin on the host, for every format."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import gather_cases
import pytest
import torch

NAMES = [f"{name}/{geometry}/{dtype}" for name, geometry, dtype in gather_cases.cases("cpu")]


@pytest.fixture(scope="module")
def interpreted():
    if find_spec("triton") is None:
        pytest.skip("needs Triton, whose wheels are for Linux on x86-64 and aarch64")
    done = subprocess.run(
        [sys.executable, str(Path(gather_cases.__file__)), "cpu"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", NAMES)
def test_in_the_interpreter(interpreted, name):
    assert interpreted[name] == "True"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "geometry", "dtype"), list(gather_cases.cases("cuda")))
def test_on_the_device(name, geometry, dtype):
    assert gather_cases.check(name, geometry, dtype, torch.device("cuda"))
