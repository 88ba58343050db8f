"""A client before servers that lie, stumble or are something else: never a wrong row."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from conftest import small_v41
from grpc_health.v1 import health, health_pb2_grpc
from sidecars import model_tier

import engram
from engram.errors import (
    ConfigError,
    ServiceError,
    SpecError,
    SpecMismatchError,
    StoreError,
    UnavailableError,
)
from engram.proto.v1 import engram_pb2 as pb
from engram.proto.v1.engram_pb2_grpc import EngramServicer, add_EngramServicer_to_server
from engram.rows import RowFormat
from engram.service.servicer import Servicer
from engram.table import Table

TOKENS = np.arange(40)


class Liar(EngramServicer):
    """Passes calls to a true servicer, and spoils what comes back."""

    def __init__(self, tier):
        self.true = Servicer({"model": tier}, 1 << 20, 16 << 20, 8)
        self.spoil_table = lambda described: described
        self.spoil_replies = lambda replies: replies

    def ListTables(self, request, context):
        return self.true.ListTables(request, context)

    def GetTable(self, request, context):
        described = pb.GetTableResponse()
        described.CopyFrom(self.true.GetTable(request, context))
        return self.spoil_table(described)

    def Lookup(self, requests, context):
        yield from self.spoil_replies(self.true.Lookup(requests, context))


@pytest.fixture
def serve(tmp_path):
    servers = []

    def start(add, *servicers):
        server = grpc.server(ThreadPoolExecutor(8))
        for servicer in servicers:
            add(servicer, server)
        server.add_insecure_port(f"unix:{tmp_path}/s.sock")
        server.start()
        servers.append(server)
        return f"unix:{tmp_path}/s.sock"

    yield start
    for server in servers:
        server.stop(0).wait()


@pytest.fixture
def liar(serve):
    servicer = Liar(model_tier())
    servicer.address = serve(add_EngramServicer_to_server, servicer)
    return servicer


def _each(change):
    def spoil(replies):
        for reply in replies:
            change(reply)
            yield reply

    return spoil


def _twice(replies):
    for reply in replies:
        last, reply.last = reply.last, False
        yield reply
        reply.last = last
        yield reply


def _short(reply):
    reply.values = reply.values[:-1]


def _fewer(reply):
    reply.rows -= 1
    reply.values = reply.values[:-64]


def _shifted(reply):
    reply.first_row += 1


def _more(reply):
    reply.rows += 1
    reply.values += bytes(64)


def _with_scales(reply):
    reply.scales = b"1"


def _huge(reply):
    reply.rows = 2**32 - 1


@pytest.mark.parametrize(
    "spoil",
    [_twice, *map(_each, (_short, _fewer, _shifted, _more, _with_scales, _huge))],
    ids=["twice", "short", "fewer", "shifted", "more", "scales", "huge"],
)
def test_replies_that_do_not_add_up_are_refused(liar, spoil):
    with engram.connect(liar.address) as table:
        liar.spoil_replies = spoil
        with pytest.raises(ServiceError, match="where others were due"):
            # The stream that was opened by connect is still the honest one.
            _on_a_new_stream(table).lookup(TOKENS)


def _on_a_new_stream(table):
    table._tier._link.now.stream.close()
    return table


def test_answers_to_nobody_are_ignored(liar):
    def chatty(replies):
        for reply in replies:
            yield pb.LookupResponse(request_id=99, rows=5, values=b"x" * 320, last=True)
            yield pb.LookupResponse(request_id=0, last=True)
            yield reply

    liar.spoil_replies = chatty
    with engram.connect(liar.address) as table:
        assert np.array_equal(
            table.lookup(TOKENS).values, Table(model_tier()).lookup(TOKENS).values
        )


def test_a_stream_that_ends_early_is_retried_then_an_error(liar):
    table = engram.connect(liar.address)
    liar.spoil_replies = lambda replies: iter(())
    with pytest.raises(UnavailableError, match="ended the connection"):
        _on_a_new_stream(table).lookup(TOKENS)


@pytest.mark.parametrize("code", [*pb.ErrorCode.values(), 4711])
def test_every_error_code_becomes_an_error_of_one_kind(liar, code):
    def failing(reply):
        reply.Clear()
        reply.request_id, reply.last = 1, True
        reply.error.CopyFrom(pb.Error(message="said so"))
        reply.error.code = code

    liar.spoil_replies = _each(failing)
    with engram.connect(liar.address) as table:
        kinds = (ServiceError, SpecMismatchError, StoreError)
        with pytest.raises(kinds, match="said so"):
            table.lookup(TOKENS)


def _changed_spec(described):
    fields = json.loads(described.spec)
    fields["layers"][0]["multipliers"][0] += 2
    described.spec = json.dumps(fields)
    return described


def _fewer_rows(described):
    described.layers[0].rows -= 1
    return described


def _superfluous_map(described):
    described.token_map = bytes(2048)
    return described


def _no_format(described):
    described.row_format.name = "fp7"
    return described


def _wider_rows(described):
    described.row_format.dim *= 2
    return described


def _odd_map(described):
    described.token_map = bytes(2047)
    return described


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (_changed_spec, "means something else"),
        (_fewer_rows, "layers"),
        (_superfluous_map, "token map"),
        (_no_format, "fp7"),
        (_wider_rows, "64 values, those of its spec 32"),
        (_odd_map, "2047 bytes"),
    ],
)
def test_a_table_described_wrongly_is_refused(liar, spoil, word):
    liar.spoil_table = spoil
    with pytest.raises(SpecError, match=word):
        engram.connect(liar.address)


def test_another_token_map_is_refused(serve):
    from dict_tier import DictTier

    spec = small_v41()
    servicer = Liar(DictTier(spec, RowFormat("fp8-ue8m0", spec.dim), 1))
    address = serve(add_EngramServicer_to_server, servicer)
    with engram.connect(address) as table:
        assert table.spec.token_map_digest == spec.token_map_digest

    def other_map(described):
        ids = np.frombuffer(described.token_map, "<i4").copy()
        ids[[1, 2]] = ids[[2, 1]]
        described.token_map = ids.tobytes()
        return described

    servicer.spoil_table = other_map
    with pytest.raises(SpecMismatchError, match="token map"):
        engram.connect(address)


def test_another_grpc_server_is_not_engram(serve):
    address = serve(health_pb2_grpc.add_HealthServicer_to_server, health.HealthServicer())
    for name in (None, "model"):
        with pytest.raises(UnavailableError, match="not engram"):
            engram.connect(address, name)


def test_a_server_without_grpc_is_not_engram(tmp_path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s.sock"))
    listener.listen()

    def answer():
        for _ in range(3):
            try:
                client, _ = listener.accept()
            except OSError:
                return
            client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            client.close()

    threading.Thread(target=answer, daemon=True).start()
    with pytest.raises(UnavailableError) as caught:
        engram.connect(f"unix:{tmp_path}/s.sock", timeout_s=5)
    assert "\n" not in str(caught.value)
    listener.close()


def test_nothing_there_is_said_at_once(tmp_path):
    with pytest.raises(UnavailableError, match=r"No such file.*engram serve") as caught:
        engram.connect(f"unix:{tmp_path}/none.sock")
    assert "\n" not in str(caught.value)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UnavailableError, match="refused"):
        engram.connect(f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    "target",
    [
        "",
        "unix:",
        "localhost",
        "localhost:x",
        "http://localhost:1",
        "::1:80",
        "a:70000",
        "unix:/" + "x" * 108,
    ],
)
def test_addresses_that_are_none(target):
    with pytest.raises(ConfigError):
        engram.connect(target)


def test_certificates_for_a_unix_socket_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="needs no TLS"):
        engram.connect(f"unix:{tmp_path}/s.sock", root_certificates=__file__)
    with pytest.raises(ConfigError, match="together"):
        engram.connect("localhost:1", client_key=__file__)
    with pytest.raises(ConfigError, match="not a PEM"):
        engram.connect("localhost:1", root_certificates=__file__)
    with pytest.raises(ConfigError, match="cannot be read"):
        engram.connect("localhost:1", root_certificates=tmp_path / "none.pem")
