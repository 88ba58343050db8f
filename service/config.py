"""What the sidecar is told: a TOML file, then ENGRAM_* variables, then flags; the last one wins.

    listen = ["unix:/run/engram/engram.sock", "tcp:127.0.0.1:7070"]
    ram = "8GiB"                # of all tables; if left out a quarter of what is allowed, or less
    attach_uids = [1001]        # users that may attach to it, besides the sidecar's own and root
    http = "127.0.0.1:9471"     # /metrics, /livez and /readyz; "off" for none
    http_public = false         # whether that address may be one that other hosts can reach

    [[table]]
    name = "qwen"
    path = "/srv/engram/qwen"

    [tls]                       # for every tcp address; needed beyond this host
    certificate = "server.pem"
    key = "server.key"
    client_ca = "clients.pem"

    [hotset]                    # which n-grams are in memory, to begin with them after a restart
    directory = "/var/lib/engram"
    every_seconds = 300.0       # between two writings
    ngrams_per_second = 20000   # read back at most

    [limits]
    request_rows = 1048576      # rows that one request may ask for
    request_bytes = "16MiB"     # size of one request
    streams = 64                # clients connected at once
    leases = 64                 # clients attached to the RAM tier at once
    drain_seconds = 30.0        # time that running requests get after SIGTERM

Variables: ENGRAM_LISTEN (addresses), ENGRAM_TABLE (NAME=PATH) and ENGRAM_ATTACH_UIDS, each
comma-separated; ENGRAM_RAM, ENGRAM_HTTP, ENGRAM_HTTP_PUBLIC, ENGRAM_TLS_<key> and
ENGRAM_LIMITS_<key>. Tables add up, by name; other lists replace one another.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from engram.errors import ConfigError
from engram.service.sockets import HTTP_DEFAULT, Address, parse_address, parse_http
from engram.sizes import parse_size

_SECTIONS = ("tls", "limits", "hotset")
_LISTS = {"ENGRAM_LISTEN": "listen", "ENGRAM_ATTACH_UIDS": "attach_uids"}
_SCALARS = {"ENGRAM_RAM": "ram", "ENGRAM_HTTP": "http", "ENGRAM_HTTP_PUBLIC": "http_public"}
# Not settings: where compiled code is kept, and what Kubernetes sets for a Service named engram.
_NOT_OURS = re.compile(
    r"ENGRAM_(CACHE_DIR|(.+_)?SERVICE_(HOST|PORT)(_.*)?|PORT(_.*)?|.+_PORT(_.*)?)"
)

Size = Annotated[int, BeforeValidator(lambda given: _in_pydantic(parse_size, given))]
Uid = Annotated[int, Field(ge=0, lt=2**32 - 1)]
Listen = Annotated[Address, BeforeValidator(lambda given: _in_pydantic(parse_address, given))]
Http = Annotated[Address | None, BeforeValidator(lambda given: _in_pydantic(parse_http, given))]


def _in_pydantic(parse: Any, given: Any) -> Any:
    try:
        return parse(given)
    except ConfigError as error:
        raise ValueError(str(error)) from None


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class TableConfig(_Frozen):
    """A table to serve."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")
    path: Path


class TlsConfig(_Frozen):
    """PEM files; both sides show a certificate."""

    certificate: Path
    key: Path
    client_ca: Path


class HotSetConfig(_Frozen):
    """Lists of the n-grams in memory, written to disk and read back at the next start."""

    directory: Path
    every_seconds: float = Field(default=300.0, ge=1.0, le=86_400.0)
    ngrams_per_second: float = Field(default=20_000.0, ge=1.0, le=1e9)


class Limits(_Frozen):
    """What clients may ask for."""

    request_rows: int = Field(default=1 << 20, ge=1 << 10, le=1 << 24)
    request_bytes: Size = Field(default=16 << 20, ge=1 << 20, le=1 << 30)
    streams: int = Field(default=64, ge=1, le=1024)
    leases: int = Field(default=64, ge=1, le=1024)
    drain_seconds: float = Field(default=30.0, ge=0.0, le=3600.0)


class Config(_Frozen):
    """A whole configuration, valid in itself."""

    listen: tuple[Listen, ...] = Field(min_length=1)
    table: tuple[TableConfig, ...] = Field(min_length=1)
    ram: Size | None = None
    attach_uids: tuple[Uid, ...] = ()
    http: Http = parse_http(HTTP_DEFAULT)
    http_public: bool = False
    tls: TlsConfig | None = None
    limits: Limits = Limits()
    hotset: HotSetConfig | None = None

    @property
    def sockets(self) -> tuple[Path, ...]:
        """Paths of the Unix sockets to listen on."""
        return tuple(address.path for address in self.listen if address.path is not None)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        for what, items in (
            ("table name", [table.name for table in self.table]),
            ("address", [str(address) for address in self.listen]),
        ):
            twice = [item for item in items if items.count(item) > 1]
            if twice:
                raise ValueError(f"{what} {twice[0]} is given twice")
        for address in self.listen:
            if address.leaves_host and self.tls is None:
                raise ValueError(
                    f"{address} can be reached from other hosts, so it needs [tls]; "
                    "add certificates or listen on tcp:127.0.0.1"
                )
        if self.http is not None and self.http.leaves_host and not self.http_public:
            raise ValueError(
                f"http {self.http.host}:{self.http.port} can be reached from other hosts, where "
                "anyone could read it; use 127.0.0.1, or allow that with http_public = true "
                "(--http-public)"
            )
        return self


def load_config(
    path: Path | None = None,
    *,
    tables: Sequence[str] = (),
    listen: Sequence[str] = (),
    ram: str | None = None,
    http: str | None = None,
    http_public: bool = False,
    environment: Mapping[str, str] | None = None,
    origins: dict[str, str] | None = None,
) -> Config:
    """Read the file, then the variables, then the flags.

    Args:
        path: TOML file; None for none.
        tables: flags, NAME=PATH each.
        listen: flags, addresses.
        ram: flag, a size.
        http: flag, HOST:PORT or "off".
        http_public: flag.
        environment: `os.environ` when None.
        origins: gets what gave each value that is not a default, by keys like `ram`,
            `limits.streams` and `table.NAME`.

    Raises:
        ConfigError: anything unknown, missing, malformed or contradictory, in one line.
    """
    origins = {} if origins is None else origins
    fields = _read_file(path) if path is not None else {}
    for key in _keys(fields, fields.get("table", [])):
        origins[key] = f"file {path}"
    upper, added = _from_environment(os.environ if environment is None else environment)
    for key in _keys(upper, added):
        setting = "table" if key.startswith("table.") else key
        origins[key] = f"variable ENGRAM_{setting.replace('.', '_').upper()}"
    _add(fields, upper, added)
    flags: dict[str, Any] = {"listen": list(listen)} if listen else {}
    flags |= {} if ram is None else {"ram": ram}
    flags |= {} if http is None else {"http": http}
    flags |= {"http_public": True} if http_public else {}
    added = [_table(flag) for flag in tables]
    for key in _keys(flags, added):
        setting = "table" if key.startswith("table.") else key
        origins[key] = f"flag --{setting.replace('_', '-')}"
    _add(fields, flags, added)
    for needed, flag in (("table", "--table NAME=PATH"), ("listen", "--listen unix:PATH")):
        if not fields.get(needed):
            raise ConfigError(f"nothing to serve: no {needed} is given; add {flag}")
    try:
        return Config.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(_one_line(error, path)) from None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        fields = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    for name in _SECTIONS:
        if not isinstance(fields.get(name, {}), dict):
            raise ConfigError(f"{path}: {name} must be a section, [{name}]")
    tables = fields.get("table", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{path}: tables must be sections of their own, [[table]]")
    return fields


def _from_environment(environment: Mapping[str, str]) -> tuple[dict[str, Any], list[Any]]:
    fields: dict[str, Any] = {}
    tables: list[Any] = []
    for variable, value in environment.items():
        if not variable.startswith("ENGRAM_") or _NOT_OURS.fullmatch(variable):
            continue
        section, _, key = variable.removeprefix("ENGRAM_").lower().partition("_")
        items = [item.strip() for item in value.split(",") if item.strip()]
        if section in _SECTIONS and key:
            fields.setdefault(section, {})[key] = value
        elif variable in _LISTS:
            fields[_LISTS[variable]] = items
        elif variable in _SCALARS:
            fields[_SCALARS[variable]] = value
        elif section == "table" and not key:
            tables = [_table(item) for item in items]
        else:
            raise ConfigError(f"the variable {variable} is unknown; unset it or correct its name")
    return fields, tables


def _table(flag: str) -> dict[str, str]:
    name, equals, path = flag.partition("=")
    if not (name and equals and path):
        raise ConfigError(f"{flag!r} is not a table; write NAME=PATH")
    return {"name": name, "path": path}


def _add(fields: dict[str, Any], upper: dict[str, Any], tables: list[Any]) -> None:
    """Lay `upper` over `fields`: sections key by key, tables by name, the rest as a whole."""
    for name, value in upper.items():
        fields[name] = {**fields.get(name, {}), **value} if name in _SECTIONS else value
    replaced = {table["name"] for table in tables}
    kept = [table for table in fields.get("table", []) if table.get("name") not in replaced]
    fields["table"] = kept + tables


def _keys(fields: Mapping[str, Any], tables: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Names of all values of a layer."""
    for name, value in fields.items():
        if name in _SECTIONS:
            yield from (f"{name}.{key}" for key in value)
        elif name != "table":
            yield name
    for table in tables:
        yield f"table.{table.get('name')}"


def _one_line(error: ValidationError, path: Path | None) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        said = "is unknown; remove it or correct its name"
    return (
        f"{path or 'configuration'}: {where}: {said}"
        if where
        else f"{path or 'configuration'}: {said}"
    )
