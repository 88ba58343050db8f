"""How much memory a RAM tier may take."""

from __future__ import annotations

import subprocess
import sys

import pytest
from sidecars import environment

from engram.errors import ConfigError
from engram.ram import limits
from engram.ram.limits import check_budget, memory_allowed

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path):
    """Makes a machine of 64 GiB, with a process in some cgroups; what that may have."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)

    def make(memberships, files):
        (proc / "meminfo").write_text(f"MemTotal: {64 << 20} kB\nMemAvailable: {48 << 20} kB\n")
        (proc / "self" / "cgroup").write_text(memberships)
        for name, content in files.items():
            (cgroups / name).parent.mkdir(parents=True, exist_ok=True)
            (cgroups / name).write_text(f"{content}\n")
        return memory_allowed(proc, cgroups)

    return make


CGROUPS = {
    "none": ("", {}, 64),
    "no limit": ("0::/a", {"a/memory.max": "max"}, 64),
    "a limit": ("0::/a/b", {"a/b/memory.max": 8 * GIB, "a/memory.max": "max"}, 8),
    "a tighter one above": ("0::/a/b", {"a/b/memory.max": 8 * GIB, "a/memory.max": 3 * GIB}, 3),
    "a container's own root": ("0::/", {"memory.max": 5 * GIB}, 5),
    "a path of the host": ("0::/host/path", {"memory.max": 5 * GIB}, 5),
    "a path from outside": ("0::/../other", {"memory.max": 5 * GIB, "other/memory.max": GIB}, 1),
    "above the machine": ("0::/a", {"a/memory.max": 900 * GIB}, 64),
    "the first version": (
        "9:cpu:/x\n4:cpu,memory:/a\n0::/",
        {"memory/a/memory.limit_in_bytes": 7 * GIB, "x/memory.max": GIB},
        7,
    ),
    "the first version, no limit": (
        "4:memory:/a",
        {"memory/a/memory.limit_in_bytes": 9223372036854771712},
        64,
    ),
}


@pytest.mark.parametrize("what", CGROUPS)
def test_the_tightest_limit_counts(machine, what):
    memberships, files, gib = CGROUPS[what]
    assert machine(memberships, files) == gib * GIB


def test_a_machine_that_does_not_say_is_refused(tmp_path):
    (tmp_path / "meminfo").write_text("Nothing: 1 kB\n")
    with pytest.raises(ConfigError, match="names no MemTotal; name the RAM tier's size"):
        memory_allowed(tmp_path, tmp_path)


def test_a_budget_must_be_allowed_and_free(monkeypatch):
    known = {"MemTotal": 8 * GIB, "MemAvailable": 2 * GIB}
    monkeypatch.setattr(limits, "meminfo", lambda proc, name: known[name])
    monkeypatch.setattr(limits, "memory_allowed", lambda: 8 * GIB)
    for budget in (0, 2 * GIB):
        check_budget(budget)
    with pytest.raises(ConfigError, match=r"of 9GiB is more than the 8GiB that this process may"):
        check_budget(9 * GIB)
    with pytest.raises(ConfigError, match=r"of 3GiB is more than the 2GiB that are free"):
        check_budget(3 * GIB)


def test_serve_refuses_a_ram_tier_beyond_the_machine_in_one_line(tmp_path, qwen_table):
    command = [sys.executable, "-m", "engram", "serve", "--ram", "900TiB"]
    place = tmp_path / "s"
    done = subprocess.run(
        [*command, "--table", f"q={qwen_table}", "--listen", f"unix:{place}"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
        check=False,
    )
    assert done.returncode == 2
    assert "a RAM tier of 900TiB is more than the " in done.stderr
    assert done.stderr.count("\n") == 1
    assert not place.exists()
