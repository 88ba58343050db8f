"""Single bits flipped and files cut short, hundreds of times: each is noticed, nobody dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from store_tables import build

TESTS = Path(__file__).parent


def trials(table: Path, *arguments: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        [sys.executable, str(TESTS / "bitflip_trials.py"), str(table), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    made, wrong = json.loads(done.stdout)
    return made, wrong


def test_every_damage_is_noticed(tmp_path):
    table = build(tmp_path / "t")
    arguments = ("flip_in_a_row=200", "flip_in_lmdbs_own_pages=100", "flip_elsewhere=100", "cut=20")
    assert trials(table, "1", *arguments) == (420, [])
