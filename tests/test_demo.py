"""`engram demo`, small: the whole path in real processes."""

from __future__ import annotations

import re

from test_cli import engram


def test_the_demo_checks_every_byte_and_the_model(tmp_path):
    done = engram(
        *("demo", "--directory", tmp_path, "--vocab-size", 2000, "--tokens", 4096, "--steps", 5),
        env=None,
    )
    assert done.returncode == 0, done.stderr
    assert "every byte" in done.stdout
    assert "right" in done.stdout
    assert len(re.findall("identical", done.stdout)) == 2
    cold, warm = re.findall(r"from RAM \((\d+\.\d)%\)", done.stdout.replace("\n", " "))
    assert float(cold) < float(warm) == 100.0
    assert re.search(r"status page was at http://127\.0\.0\.1:\d+/", done.stdout)
    assert "80%" in done.stdout  # of the plan
    assert "twice the" in done.stdout  # RAM, maybe on a line of its own
    assert (tmp_path / "v41" / "table.json").exists()
    assert (tmp_path / "qwen" / "table.json").exists()


def test_a_wrong_byte_would_be_noticed(v41_table):
    import numpy as np

    import engram as package
    from engram.demo.traffic import Batch, check_rows
    from engram.store.manifest import read_manifest

    seed = read_manifest(v41_table)[0].table_seed
    with package.open(v41_table) as table:
        batch = Batch(
            "prefill", np.arange(9, dtype=np.int32), np.array([0, 9]), np.full((1, 3), -1, np.int32)
        )
        rows = table.lookup(batch.tokens, batch.starts, batch.history)
        assert check_rows(table, seed, batch, rows) == 0
        rows.values[3, 1, 7, 11] ^= 1
        assert check_rows(table, seed, batch, rows) == 1
