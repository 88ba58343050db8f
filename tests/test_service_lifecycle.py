"""A sidecar's life: start, health, ownership of its socket, overload, drain, death, return."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
import threading
import time
from queue import SimpleQueue

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from sidecars import Sidecar, environment, model_tier, remote_table

import engram
from engram.errors import OverloadError, SpecMismatchError, UnavailableError
from engram.proto.v1 import engram_pb2 as pb
from engram.proto.v1.engram_pb2_grpc import EngramStub
from engram.table import Table

TOKENS = np.arange(40)


@pytest.fixture(scope="module")
def expected():
    return Table(model_tier()).lookup(TOKENS).values


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory):
    place = tmp_path_factory.mktemp("run") / "s.sock"
    tables = {"one": {}, "two": {"seed": 2}}
    with Sidecar(place, tables, listen=["tcp:127.0.0.1:0"], streams=2) as running:
        yield running


def _health(address, service):
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


@pytest.mark.parametrize("service", ["", "engram.v1.Engram", "one", "two"])
def test_health_is_told_for_the_whole_and_each_table(sidecar, service):
    assert _health(sidecar.address, service) == "SERVING"


def test_health_of_an_unknown_table_is_not_found(sidecar):
    with pytest.raises(grpc.RpcError) as caught:
        _health(sidecar.address, "three")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def _reflect(address, **request):
    with grpc.insecure_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(**request)])
        return next(iter(stub.ServerReflectionInfo(asked, timeout=10)))


def test_reflection_lists_the_service_and_its_schema(sidecar):
    listed = _reflect(sidecar.address, list_services="").list_services_response.service
    assert "engram.v1.Engram" in {service.name for service in listed}
    found = _reflect(sidecar.address, file_containing_symbol="engram.v1.Engram")
    files = found.file_descriptor_response.file_descriptor_proto
    assert descriptor_pb2.FileDescriptorProto.FromString(files[0]).name == "engram/v1/engram.proto"


def test_the_ready_line_says_what_is_served_where(sidecar):
    (line,) = sidecar.lines
    assert line.startswith("engram: serving one (qwen4_exp, ")
    assert str(sidecar.socket) in line
    assert "tcp:127.0.0.1:" in line
    assert "tcp:127.0.0.1:0" not in line


def test_tcp_on_this_host_is_served_in_the_clear(sidecar, expected):
    port = int(sidecar.lines[0].rpartition("tcp:127.0.0.1:")[2].partition(";")[0])
    for target in (f"127.0.0.1:{port}", f"dns:///localhost:{port}"):
        with engram.connect(target, "one") as table:
            assert np.array_equal(table.lookup(TOKENS).values, expected)


def test_modes_of_the_files(sidecar):
    assert stat.S_IMODE(sidecar.socket.stat().st_mode) == 0o660
    lock = sidecar.socket.with_name(sidecar.socket.name + ".lock")
    assert stat.S_IMODE(lock.stat().st_mode) == 0o600


def test_a_second_server_refuses_in_one_line(sidecar, qwen_table, expected):
    command = [sys.executable, "-m", "engram", "serve", "--table", f"q={qwen_table}"]
    second = subprocess.run(
        [*command, "--listen", sidecar.address],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
        check=False,
    )
    assert second.returncode == 2
    (line,) = second.stderr.splitlines()
    assert "another server has" in line
    assert str(sidecar.socket) in line
    with engram.connect(sidecar.address, "one") as table:
        assert np.array_equal(table.lookup(TOKENS).values, expected)


def test_one_client_too_many_is_refused_and_may_come_back(sidecar, expected):
    first, second = (engram.connect(sidecar.address, "one") for _ in range(2))
    with pytest.raises(OverloadError, match="2 clients are connected already"):
        engram.connect(sidecar.address, "two")
    assert np.array_equal(first.lookup(TOKENS).values, expected)
    second.close()
    deadline = time.monotonic() + 20
    while True:
        try:
            third = engram.connect(sidecar.address, "one")
            break
        except OverloadError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert np.array_equal(third.lookup(TOKENS).values, expected)
    third.close()
    first.close()


def test_calls_beyond_what_there_are_threads_for_are_refused_at_once(sidecar):
    """Two clients' three streams and eight other calls may run; fourteen that never ask hold it."""
    silent: SimpleQueue = SimpleQueue()
    with grpc.insecure_channel(sidecar.address) as channel:
        ask = channel.stream_unary("/engram.v1.Engram/ListTables")
        held = [ask.future(iter(silent.get, None)) for _ in range(14)]
        _until(lambda: "no room" in _refusal(sidecar.address))
        for call in held:
            call.cancel()
            silent.put(None)
    _until(lambda: not _refusal(sidecar.address))


def _refusal(address):
    """What a client is told that is one too many; nothing if it is served."""
    try:
        engram.connect(address, "one", timeout_s=10).close()
    except OverloadError as error:
        return str(error)
    return ""


def test_after_a_kill_the_client_fails_then_works_again(tmp_path, expected):
    with Sidecar(tmp_path / "s.sock", {"one": {}}) as running:
        table = remote_table(running.address)
        assert np.array_equal(table.lookup(TOKENS).values, expected)
        boot_id = table.stats()["tiers"][0]["boot_id"]
        running.kill()
        assert running.socket.exists()
        for _ in range(2):
            with pytest.raises(UnavailableError, match="cannot be reached") as caught:
                table.lookup(TOKENS)
            assert "\n" not in str(caught.value)
        running.start()
        assert np.array_equal(table.lookup(TOKENS).values, expected)
        stats = table.stats()["tiers"][0]
        assert stats["boot_id"] != boot_id
        assert stats["reconnects"] == 1
        table.close()


def test_a_kill_amid_lookups_never_gives_wrong_rows(tmp_path, expected):
    with Sidecar(tmp_path / "s.sock", {"one": {"delay_s": 0.01}}) as running:
        table = remote_table(running.address)
        right, failed, odd = [], [], []
        over = threading.Event()

        def work():
            while not over.is_set():
                try:
                    right.append(np.array_equal(table.lookup(TOKENS).values, expected))
                except UnavailableError as error:
                    failed.append(error)
                    time.sleep(0.01)
                except Exception as error:
                    odd.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(2):
            enough = len(right) + 10
            _until(lambda enough=enough: len(right) > enough)
            running.kill()
            running.start()
        enough = len(right) + 10
        _until(lambda: len(right) > enough)
        over.set()
        for thread in threads:
            thread.join()
        assert all(right)
        assert not odd
        assert table.stats()["tiers"][0]["reconnects"] == 2
        table.close()


def test_another_table_under_the_name_is_refused(tmp_path):
    with Sidecar(tmp_path / "s.sock", {"one": {}}) as running:
        table = remote_table(running.address)
        running.kill()
        running.told["tables"] = {"one": {"seed": 3}}
        running.start()
        with pytest.raises(SpecMismatchError, match="another table") as caught:
            table.lookup(TOKENS)
        assert caught.value.field == "fingerprint"


def test_running_lookups_survive_sigterm(tmp_path, expected):
    with Sidecar(tmp_path / "s.sock", {"one": {"delay_s": 0.05}}) as running:
        tables = [remote_table(running.address) for _ in range(2)]
        right, wrong = [], []

        def work(table):
            try:
                right.append(np.array_equal(table.lookup(TOKENS).values, expected))
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(tables[i % 2],)) for i in range(60)]
        for thread in threads:
            thread.start()
        streams = [table._tier._link.now.stream for table in tables]
        _until(lambda: sum(len(stream._pending) for stream in streams) + len(right) == 60)
        running.process.send_signal(signal.SIGTERM)
        _until(lambda: "stopping" in running.lines[-1])
        with pytest.raises(UnavailableError):
            engram.connect(running.address, timeout_s=5)
        for thread in threads:
            thread.join()
        assert not wrong
        assert right == [True] * 60
        assert running.process.wait(timeout=30) == 0
        assert not running.socket.exists()
        with pytest.raises(UnavailableError):
            tables[0].lookup(TOKENS)


def test_health_turns_at_once_when_draining_and_idle_clients_do_not_hold_it_up(tmp_path):
    with Sidecar(tmp_path / "s.sock", {"one": {}}, drain_seconds=2.0) as running:
        idle = engram.connect(running.address)
        channel = grpc.insecure_channel(running.address)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        # A client that ignores the call to finish delays the end, but only so long.
        stubborn: SimpleQueue = SimpleQueue()
        stream = EngramStub(channel).Lookup(iter(stubborn.get, None))
        stream.initial_metadata()
        running.process.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert next(stream).draining
        assert running.process.wait(timeout=30) == 0
        stubborn.put(None)
        channel.close()
        idle.close()


def test_a_stopped_sidecar_is_an_error_within_the_deadline(tmp_path, expected):
    with Sidecar(tmp_path / "s.sock", {"one": {}}) as running:
        table = remote_table(running.address, timeout_s=0.5)
        running.process.send_signal(signal.SIGSTOP)
        with pytest.raises(UnavailableError, match="did not answer in time"):
            table.lookup(TOKENS)
        with pytest.raises(UnavailableError, match="did not answer in time"):
            engram.connect(running.address, timeout_s=0.5)
        running.process.send_signal(signal.SIGCONT)
        # The late answer to the first lookup must not be taken for this one's.
        assert np.array_equal(table.lookup(TOKENS[::-1]).values, _of(TOKENS[::-1]))
        table.close()


def _of(tokens):
    return Table(model_tier()).lookup(tokens).values


def _until(holds, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "did not come about"
        time.sleep(0.005)


def test_an_empty_stream_ends_in_order(sidecar):
    with grpc.insecure_channel(sidecar.address) as channel:
        assert list(EngramStub(channel).Lookup(iter(()))) == []
        listed = EngramStub(channel).ListTables(pb.ListTablesRequest())
    assert [table.name for table in listed.tables] == ["one", "two"]
