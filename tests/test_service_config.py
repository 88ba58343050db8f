"""Configuration: three layers, and everything unknown or contradictory refused in one line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.errors import ConfigError
from engram.service.config import load_config
from engram.service.sockets import parse_address
from engram.sizes import format_size, parse_size

WHOLE = """
listen = ["unix:/run/a.sock", "tcp:127.0.0.1:7070"]
ram = "8GiB"
attach_uids = [1001, 1002]

[[table]]
name = "qwen"
path = "/srv/qwen"

[[table]]
name = "v41"
path = "/srv/v41"

[limits]
request_rows = 5000
request_bytes = "2MiB"
streams = 3
leases = 5
drain_seconds = 1.5
"""


@pytest.fixture
def load(tmp_path):
    def load(text=None, tables=(), listen=(), ram=None, http=None, public=False, **environment):
        path = None
        if text is not None:
            path = tmp_path / "engram.toml"
            path.write_text(text)
        return load_config(
            path,
            tables=tables,
            listen=listen,
            ram=ram,
            http=http,
            http_public=public,
            environment=environment,
        )

    return load


def test_a_whole_file(load):
    config = load(WHOLE)
    assert [str(address) for address in config.listen] == [
        "unix:/run/a.sock",
        "tcp:127.0.0.1:7070",
    ]
    assert [(table.name, str(table.path)) for table in config.table] == [
        ("qwen", "/srv/qwen"),
        ("v41", "/srv/v41"),
    ]
    assert config.limits.model_dump() == {
        "request_rows": 5000,
        "request_bytes": 2 << 20,
        "streams": 3,
        "leases": 5,
        "drain_seconds": 1.5,
    }
    assert (config.ram, config.attach_uids) == (8 << 30, (1001, 1002))


def test_flags_alone_are_enough(load):
    config = load(tables=["a=/x", "b=/y=z"], listen=["unix:/s"])
    assert [(t.name, str(t.path)) for t in config.table] == [("a", "/x"), ("b", "/y=z")]
    assert config.limits.request_rows == 1 << 20
    assert config.ram is None


def test_flags_win_over_variables_and_these_over_the_file(load):
    environment = {
        "ENGRAM_LISTEN": "unix:/env, tcp:localhost:1",
        "ENGRAM_TABLE": "qwen=/env/qwen,new=/env/new",
        "ENGRAM_LIMITS_STREAMS": "9",
        "ENGRAM_RAM": "2GiB",
        "ENGRAM_ATTACH_UIDS": "7, 8",
        "PATH": "/bin",
    }
    config = load(WHOLE, **environment)
    assert [str(address) for address in config.listen] == ["unix:/env", "tcp:localhost:1"]
    assert {t.name: str(t.path) for t in config.table} == {
        "v41": "/srv/v41",
        "qwen": "/env/qwen",
        "new": "/env/new",
    }
    assert config.limits.streams == 9
    assert (config.ram, config.attach_uids) == (2 << 30, (7, 8))
    assert config.limits.request_rows == 5000
    config = load(WHOLE, tables=["new=/flag"], listen=["unix:/flag"], ram="0", **environment)
    assert config.ram == 0
    assert [str(address) for address in config.listen] == ["unix:/flag"]
    assert {t.name: str(t.path) for t in config.table}["new"] == "/flag"


def _http(config):
    return config.http and (config.http.host, config.http.port)


def test_http_is_on_loopback_unless_said_otherwise(load):
    assert _http(load(WHOLE)) == ("127.0.0.1", 9471)
    text = 'http = "localhost:1"\n' + WHOLE
    assert _http(load(text)) == ("localhost", 1)
    assert _http(load(text, ENGRAM_HTTP="[::1]:2")) == ("[::1]", 2)
    assert _http(load(text, ENGRAM_HTTP="[::1]:2", http="127.0.0.1:0")) == ("127.0.0.1", 0)
    assert _http(load(text, ENGRAM_HTTP="off")) is None
    assert _http(load('http = "off"\n' + WHOLE)) is None
    assert _http(load(WHOLE, http="off")) is None


def test_http_for_other_hosts_must_be_allowed(load):
    everywhere = 'http = "0.0.0.0:9471"\n'
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0:9471 can be reached from other hosts"):
        load(everywhere + WHOLE)
    for allowed in (
        load(everywhere + "http_public = true\n" + WHOLE),
        load(everywhere + WHOLE, ENGRAM_HTTP_PUBLIC="true"),
        load(everywhere + WHOLE, public=True),
    ):
        assert _http(allowed) == ("0.0.0.0", 9471)


@pytest.mark.parametrize(
    "variable",
    ["ENGRAM_CACHE_DIR", "ENGRAM_PORT", "ENGRAM_SERVICE_HOST", "ENGRAM_PORT_7070_TCP_ADDR"],
)
def test_variables_that_are_no_settings_are_left_alone(load, variable):
    load(WHOLE, **{variable: "anything"})


BAD = {
    "unknown key": (WHOLE + "ram = 1", {}, "limits.ram: is unknown"),
    "unknown section": (WHOLE + "[log]\nlevel = 1", {}, "log: is unknown"),
    "unknown table key": (WHOLE.replace("path =", "paht =", 1), {}, "table.0.path"),
    "not TOML": ("listen = [", {}, "is not TOML"),
    "limits no section": ("limits = 3", {}, "must be a section"),
    "table no list": ("[table]\nname = 'x'", {}, "sections of their own"),
    "no table": ('listen = ["unix:/s"]', {}, "--table NAME=PATH"),
    "no address": ("", {"tables": ["a=/x"]}, "--listen unix:PATH"),
    "bad name": (None, {"tables": ["../x=/x"], "listen": ["unix:/s"]}, "table.0.name"),
    "no path": (None, {"tables": ["x"], "listen": ["unix:/s"]}, "NAME=PATH"),
    "a name twice": (None, {"tables": ["x=/a", "x=/b"], "listen": ["unix:/s"]}, "twice"),
    "an address twice": (None, {"tables": ["x=/a"], "listen": ["unix:/s", "unix:/s"]}, "twice"),
    "other hosts without tls": (
        None,
        {"tables": ["x=/a"], "listen": ["tcp:0.0.0.0:1"]},
        "needs [tls]",
    ),
    "other hosts by name": (
        None,
        {"tables": ["x=/a"], "listen": ["tcp:example.org:1"]},
        "needs [tls]",
    ),
    "unknown variable": (WHOLE, {"ENGRAM_LISTENS": "unix:/s"}, "ENGRAM_LISTENS is unknown"),
    "unknown limit": (WHOLE, {"ENGRAM_LIMITS_RAM": "1"}, "limits.ram: is unknown"),
    "limit no number": (WHOLE, {"ENGRAM_LIMITS_STREAMS": "many"}, "limits.streams"),
    "size": (WHOLE.replace("2MiB", "2MB"), {}, "is not a size"),
    "limit too small": (WHOLE.replace("2MiB", "1KiB"), {}, "limits.request_bytes"),
    "limit too large": (WHOLE.replace("= 3", "= 99999"), {}, "limits.streams"),
    "ram": (WHOLE.replace('"8GiB"', '"8GB"'), {}, "ram: '8GB' is not a size"),
    "ram below nothing": (None, {"tables": ["x=/a"], "listen": ["unix:/s"], "ram": "-1"}, "ram"),
    "a user by name": (WHOLE.replace("1002", '"root"'), {}, "attach_uids.1"),
    "nobody": (WHOLE, {"ENGRAM_ATTACH_UIDS": "4294967295"}, "attach_uids.0"),
    "no leases": (WHOLE.replace("leases = 5", "leases = 0"), {}, "limits.leases"),
    "http no address": ('http = "9471"\n' + WHOLE, {}, "http: '9471' is not HOST:PORT"),
    "http for other hosts": (WHOLE, {"http": "10.0.0.1:1"}, "--http-public"),
    "http_public no answer": (WHOLE, {"ENGRAM_HTTP_PUBLIC": "perhaps"}, "http_public"),
    "half of tls": (WHOLE + "[tls]\nkey = 'k'", {}, "tls.certificate"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_named_in_one_line(load, what):
    text, given, word = BAD[what]
    with pytest.raises(ConfigError) as caught:
        load(text, **given)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read"):
        load_config(tmp_path / "none.toml", environment={})


def test_a_frozen_configuration(load):
    config = load(WHOLE)
    with pytest.raises(ValueError, match="frozen"):
        config.limits.streams = 4


@pytest.mark.parametrize(
    ("text", "host", "port", "leaves"),
    [
        ("tcp:127.0.0.1:0", "127.0.0.1", 0, False),
        ("tcp:127.8.8.8:65535", "127.8.8.8", 65535, False),
        ("tcp:localhost:80", "localhost", 80, False),
        ("tcp:[::1]:80", "[::1]", 80, False),
        ("tcp:[::]:80", "[::]", 80, True),
        ("tcp:10.0.0.1:80", "10.0.0.1", 80, True),
        ("tcp:localhost.example.org:80", "localhost.example.org", 80, True),
    ],
)
def test_tcp_addresses(text, host, port, leaves):
    address = parse_address(text)
    assert (address.host, address.port, address.leaves_host) == (host, port, leaves)
    assert str(address) == text


def test_socket_paths_are_absolute_and_short(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_address("unix:run/../s.sock").path == tmp_path / "s.sock"
    longest = "/" + "x" * 99  # PATH.attach must fit, too
    assert str(parse_address(f"unix:{longest}")) == f"unix:{longest}"
    with pytest.raises(ConfigError, match="108 bytes, but a socket's path at most 107"):
        parse_address(f"unix:{longest}x")
    with pytest.raises(ConfigError, match="116 bytes"):
        parse_address("unix:/" + "é" * 54)


@pytest.mark.parametrize(
    "text",
    ["", "unix:", "/run/s", "tcp:", "tcp:7070", "tcp:::1:80", "tcp:a:-1", "tcp:a:65536", "udp:a:1"],
)
def test_addresses_that_are_none(text):
    with pytest.raises(ConfigError):
        parse_address(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("17", 17),
        (17, 17),
        ("1B", 1),
        ("1KiB", 1024),
        (" 1.5 GiB ", 3 << 29),
        ("2TiB", 2 << 40),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "1GB", "1gib", "1e3", "0.3B", "1 2", "inf", "1.GiB"]
)
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="is not a"):
        parse_size(text)


@given(st.integers(0, 2**50))
def test_a_formatted_size_is_near(size):
    text = format_size(size)
    digits = text.rstrip("BKMGTi")
    unit = parse_size("1" + text[len(digits) :])
    assert abs(float(digits) * unit - size) <= unit / 20 + 1e-9 * unit
    assert unit <= max(size, 1)
