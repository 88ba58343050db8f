"""Attach servers for tests, in this process and in others, and clients of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager

from conftest import small_qwen
from dict_tier import DictTier
from sidecars import environment

from engram.ram.attach import Lease
from engram.ram.tier import ram_tiers
from engram.rows import RowFormat
from engram.service.attach import AttachServer
from engram.ssd import SsdTier

TIMEOUT_S = 20.0
HANG_S = 60

SERVE = """
import json, sys
from pathlib import Path
from engram.ram.tier import ram_tiers
from engram.service.attach import AttachServer
from engram.ssd import SsdTier
place, tables = Path(sys.argv[1]), json.loads(sys.argv[2])
opened = {name: SsdTier(path) for name, path in tables.items()}
tiers = ram_tiers(opened, 1 << 20, shared=True)
server = AttachServer([place], tiers, {name: tier.files for name, tier in opened.items()})
server.start()
print("serving", flush=True)
sys.stdin.read()
"""
"""An attach server's process: it is told its path and, as JSON, where its tables are."""

ATTACH = """
import json, sys
from pathlib import Path
from engram.ram.attach import Lease
from engram.ram.layout import BundleLayout
place, table, fingerprint, bundle, min_order = json.loads(sys.argv[1])

def attach():
    return Lease.open(Path(place), table, fingerprint, BundleLayout(*bundle), min_order, 20.0)
"""
"""How a client's process begins: it is told what `Host.told` gives."""


def until(condition, seconds=HANG_S):
    """Wait for what happens in another thread or process."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def descriptors():
    """How many this process has."""
    return len(os.listdir("/proc/self/fd"))


def process(code, *arguments):
    """Python code in a process that lives until its input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )


class Host:
    """An attach server in this process."""

    def __init__(self, place, tiers, files, **options):
        self.place, self.tiers = place, tiers
        self.server = AttachServer([place], tiers, files, **options)
        self.server.start()

    def attach(self, name="v41", **changes):
        """A lease on a table, asked for rightly but for `changes`."""
        tier = self.tiers[name]
        wanted = {
            "path": self.place,
            "table": name,
            "fingerprint": tier.fingerprint,
            "bundle": tier.bundle,
            "min_order": tier.spec.min_order,
            "timeout_s": TIMEOUT_S,
        }
        return Lease.open(**(wanted | changes))

    def told(self, name="v41"):
        """What a process that begins with `ATTACH` must be told."""
        tier = self.tiers[name]
        b = tier.bundle
        bundle = [b.layers, b.heads, b.value_bytes, b.scale_bytes, b.max_order]
        return json.dumps([str(self.place), name, tier.fingerprint, bundle, tier.spec.min_order])

    @property
    def leases(self):
        return self.server.stats()["leases"]


@contextmanager
def host_of(place, tables, budget=4 << 20, **options):
    """A host of tables on disk, and of one named "model" that has no file."""
    spec = small_qwen()
    opened = {name: SsdTier(path) for name, path in tables.items()}
    files = {name: tier.files for name, tier in opened.items()}
    opened["model"] = DictTier(spec, RowFormat("bf16", spec.dim), 1)
    tiers = ram_tiers(opened, budget, shared=True, boot_id=bytes(range(16)))
    host = Host(place, tiers, files, **options)
    try:
        yield host
    finally:
        host.server.stop()
        for tier in tiers.values():
            tier.check_integrity()
            tier.close()
