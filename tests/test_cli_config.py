"""`engram config show`: the whole configuration, as a file that gives the same one again."""

from __future__ import annotations

import os
import tomllib

import pytest
from test_cli import engram
from test_service_config import WHOLE

from engram.cli.config import toml_lines
from engram.service.config import load_config

NO_SETTINGS = {key: value for key, value in os.environ.items() if not key.startswith("ENGRAM_")}
FLAGS = ["--table", "new=/flag", "--ram", "300MiB"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "engram.toml"
    path.write_text(WHOLE)
    return path


def _shown(*arguments, **variables):
    done = engram("config", "show", *arguments, env={**NO_SETTINGS, **variables})
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_what_is_shown_is_a_file_that_gives_the_same(file, tmp_path):
    shown = _shown(file, "--origin", *FLAGS, ENGRAM_LIMITS_LEASES="7", ENGRAM_HTTP="off")
    again = tmp_path / "again.toml"
    again.write_text(shown)
    wanted = load_config(
        file,
        tables=["new=/flag"],
        ram="300MiB",
        environment={"ENGRAM_LIMITS_LEASES": "7", "ENGRAM_HTTP": "off"},
    )
    assert load_config(again, environment={}) == wanted
    assert _shown("--config", again) == "".join(
        f"{line.partition('  #')[0]}\n" for line in shown.splitlines()
    )


def test_everything_is_there_whatever_was_given():
    fields = tomllib.loads(_shown("--table", "a=/x", "--listen", "unix:/s"))
    assert set(fields) == {"listen", "attach_uids", "http", "http_public", "table", "limits"}
    assert set(fields["limits"]) >= {"request_bytes", "streams", "leases", "drain_seconds"}
    assert fields["limits"]["request_bytes"] == "16MiB"


def test_where_each_value_comes_from(file):
    variables = {"ENGRAM_LIMITS_LEASES": "7", "ENGRAM_TABLE": "v41=/variable"}
    shown = _shown(file, "--origin", *FLAGS, **variables).splitlines()
    for line in (
        f'listen = ["unix:/run/a.sock", "tcp:127.0.0.1:7070"]  # file {file}',
        'ram = "300MiB"  # flag --ram',
        "http_public = false  # default",
        f'path = "/srv/qwen"  # file {file}',
        'path = "/variable"  # variable ENGRAM_TABLE',
        'name = "new"  # flag --table',
        "leases = 7  # variable ENGRAM_LIMITS_LEASES",
        f"streams = 3  # file {file}",
    ):
        assert line in shown
    assert "  #" not in _shown(file)


def test_odd_values_survive(tmp_path):
    first = load_config(
        tables=['a=/x "y"\\z\x7f\t💾'], listen=["unix:/s"], ram="1234567", environment={}
    )
    path = tmp_path / "odd.toml"
    path.write_text("\n".join(toml_lines(first)))
    assert load_config(path, environment={}) == first
    assert "ram = 1234567" in path.read_text().splitlines()


def test_certificates_are_shown(tmp_path):
    path = tmp_path / "tls.toml"
    path.write_text(WHOLE + '[tls]\ncertificate = "c.pem"\nkey = "k.pem"\nclient_ca = "ca.pem"\n')
    shown = _shown(path, ENGRAM_TLS_KEY="other.pem")
    assert load_config(path, environment={"ENGRAM_TLS_KEY": "other.pem"}).tls is not None
    assert tomllib.loads(shown)["tls"]["key"] == "other.pem"


def test_errors_are_those_of_serve(file):
    file.write_text("ramm = 1\n" + WHOLE)
    told = [
        engram(*command, "--config", file, env=NO_SETTINGS)
        for command in (["serve"], ["config", "show"])
    ]
    assert (
        told[0].stderr
        == told[1].stderr
        == f"engram: {file}: ramm: is unknown; " + ("remove it or correct its name\n")
    )
    assert [done.returncode for done in told] == [2, 2]
    assert engram("config", "show", file, "--config", file).returncode == 2
    unknown = engram("config", "show", file, env={**NO_SETTINGS, "ENGRAM_RAMM": "1"})
    assert "ENGRAM_RAMM is unknown" in unknown.stderr
