"""The command line as its users meet it: what it prints, exits with and refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import build_synthetic, small_qwen

from engram.rows import RowFormat

COMMANDS = (
    "import",
    "synth",
    "inspect",
    "verify",
    "serve",
    "config",
    "stats",
    "top",
    "health",
    "warm",
    "doctor",
    "bench",
    "demo",
    "torture",
    "trace",
    "plan",
)


def engram(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "engram", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **options,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    done = engram(command, "--help")
    assert done.returncode == 0
    assert f"Example: engram {command}" in done.stdout


def test_the_readme_names_every_command():
    from test_tidy import ROOT

    listed = re.search(r"`engram (import[^`]*)`", (ROOT / "README.md").read_text())
    assert listed is not None
    assert tuple(listed[1].split(" | ")) == COMMANDS


@pytest.mark.parametrize("arguments", [[], ["nope"], ["verify"], ["synth", "x"]])
def test_misuse_exits_2(arguments):
    assert engram(*arguments).returncode == 2


def test_synth_inspect_verify(tmp_path):
    path = tmp_path / "table"
    made = engram("synth", path, "--family", "qwen4-exp", "--vocab-size", "600", "--json")
    assert made.returncode == 0, made.stderr
    assert made.stderr == "", "no bar where there is no terminal"
    facts = json.loads(made.stdout)
    assert facts["family"] == "qwen4_exp"
    assert json.loads(engram("inspect", path, "--json").stdout) == facts
    assert facts["fingerprint"] in engram("inspect", path).stdout
    sound = engram("verify", path, "--json")
    assert (sound.returncode, json.loads(sound.stdout)["sound"]) == (0, True)
    again = engram("synth", path, "--family", "qwen4-exp", "--vocab-size", "600")
    assert again.returncode == 1
    assert again.stderr.count("\n") == 1
    assert "exists" in again.stderr


def test_verify_names_a_damaged_block(tmp_path):
    spec = small_qwen()
    path = build_synthetic(tmp_path / "t", spec, RowFormat("bf16", spec.dim))
    with (path / "data.mdb").open("r+b") as file:
        file.seek(40 * 4096 + 100)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    found = engram("verify", path, "--json")
    assert found.returncode == 1
    report = json.loads(found.stdout)
    assert not report["sound"]
    assert len(report["damage"]) == 1
    assert report["damage"][0]["page"] == 40
    assert "40" in engram("verify", path).stdout


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (["inspect", "{empty}"], 1, "not a table"),
        (["verify", "{empty}"], 1, "table.json"),
        (["bench", "{empty}"], 1, "not a table"),
        (["import", "{empty}", "{empty}/t"], 1, "config.json"),
        (["synth", "{empty}/t", "--family", "nope"], 2, "deepseek-v41"),
        (["synth", "{empty}/t", "--family", "deepseek-v41"], 2, "--tokenizer"),
        (["synth", "{empty}/t", "--family", "qwen4-exp", "--tokenizer", "x"], 2, "leave"),
        (["synth", "{empty}/t", "--family", "qwen4-exp", "--row-format", "x"], 2, "nvfp4"),
        (["serve"], 2, "--table"),
        (["serve", "--table", "a"], 2, "NAME=PATH"),
        (["serve", "--table", "a={empty}", "--listen", "nope:x"], 2, "unix:PATH"),
        (["serve", "--table", "a={empty}", "--listen", "unix:{empty}/s"], 1, "not a table"),
        (["serve", "--config", "{empty}/none.toml"], 2, "none.toml"),
    ],
)
def test_bad_input_gets_one_line(tmp_path, arguments, status, word):
    done = engram(*(argument.format(empty=tmp_path) for argument in arguments))
    said = done.stderr + (done.stdout if arguments[0] == "verify" else "")
    assert word in said
    assert done.returncode == status
    assert done.stderr.count("\n") <= 1
    assert "Traceback" not in done.stderr
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_bench_prints_figures_with_checksums(v41_table):
    done = engram("bench", v41_table, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert {figure["unit"] for figure in figures} == {"ns/token", "us", "rows/s"}
    assert all(re.fullmatch("[0-9a-f]{16}", figure["checksum"]) for figure in figures)


def test_odd_names_are_printed_as_they_are(tmp_path):
    spec = small_qwen()
    path = tmp_path / "a[bold]b" / "x[-]"
    path.parent.mkdir()
    build_synthetic(path, spec, RowFormat("bf16", spec.dim))
    shown = engram("inspect", path).stdout
    assert str(path) in "".join(line.split(maxsplit=1)[-1] for line in shown.splitlines())
    assert str(path) in engram("verify", path).stdout
    assert engram("verify", path).stdout.count("\n") == 1


def test_an_interrupt_says_so(tmp_path):
    process = subprocess.Popen(
        f"{sys.executable} -m engram synth {tmp_path}/t --family qwen4-exp "
        "--vocab-size 500000".split(),
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    while not list(tmp_path.glob(".t.*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "same command" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "t").exists()
    shutil.rmtree(*tmp_path.glob(".t.*"))
