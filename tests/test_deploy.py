"""What is deployed: units, images and manifests fit the sidecar as its code is.

No container engine and no cluster is asked: images and manifests are read and compared.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from test_tidy import ROOT

from engram.cli.health import _listening
from engram.service._endpoint import Endpoint
from engram.service.config import Limits, load_config
from engram.service.sockets import parse_http

DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "systemd" / "engram.service"
MANIFESTS = {
    name: yaml.safe_load((DEPLOY / "kubernetes" / name).read_text())
    for name in ("pod.yaml", "daemonset.yaml")
}
UNITS = {"": 1, "Mi": 1 << 20, "Gi": 1 << 30}


def _settings():
    lines = [line for line in UNIT.read_text().splitlines() if "=" in line and line[0] != "#"]
    return dict(line.split("=", 1) for line in lines)


def test_systemd_finds_nothing_wrong(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/engram/bin/engram", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_waits_as_long_as_the_sidecar_takes():
    found = _settings()
    assert found["Type"] == "notify"
    assert float(found["TimeoutStopSec"]) > Limits().drain_seconds + 10
    assert float(found["WatchdogSec"]) >= 30


def test_the_unit_lets_kernels_be_compiled_and_memory_be_read():
    found = _settings()
    assert "MemoryDenyWriteExecute" not in found
    assert "ProcSubset" not in found
    assert "PrivateUsers" not in found
    assert found["ProtectSystem"] == "strict"
    assert found["CapabilityBoundingSet"] == ""


def _instructions():
    text = re.sub(r"\\\n", " ", (DEPLOY / "Containerfile").read_text())
    lines = [line for line in text.splitlines() if line and line[0] != "#"]
    return [tuple(line.split(None, 1)) for line in lines]


def _last(name):
    return [rest for word, rest in _instructions() if word == name][-1]


def test_the_image_runs_the_sidecar_as_nobody_special():
    user, group = _last("USER").split(":")
    assert int(user) == int(group) > 0
    assert json.loads(_last("ENTRYPOINT")) + json.loads(_last("CMD")) == ["engram", "serve"]
    assert _last("STOPSIGNAL") == "SIGTERM"
    _, _, command = _last("HEALTHCHECK").partition("CMD ")
    assert json.loads(command) == ["engram", "health"]


def test_the_image_has_no_torch_and_what_the_wheel_needs():
    installs = [rest for word, rest in _instructions() if word == "RUN"]
    assert not [rest for rest in installs if "torch" in rest or ".whl[" in rest]
    copies = [part.split()[:-1] for word, part in _instructions() if word == "COPY"]
    copied = {source for sources in copies for source in sources}
    for needed in ("pyproject.toml", "README.md", "LICENSE", "engram", "deploy", "docs"):
        assert needed in copied
        assert (ROOT / needed).exists()
    listed = (ROOT / "pyproject.toml").read_text()
    for folder in re.findall(r'^"engram\.\w+" = "(\w+)"$', listed, re.M):
        assert folder in copied


def test_the_image_checks_the_address_that_it_listens_on(monkeypatch):
    variables = dict(part.split("=", 1) for part in _last("ENV").split())
    monkeypatch.setenv("ENGRAM_LISTEN", variables["ENGRAM_LISTEN"])
    assert _listening() == variables["ENGRAM_LISTEN"]
    told = {name: value for name, value in variables.items() if name.startswith("ENGRAM_")}
    assert load_config(tables=["t=/t"], environment=told).sockets


@pytest.fixture(params=MANIFESTS)
def pod(request):
    """Specification of a pod."""
    found = MANIFESTS[request.param]
    return found["spec"] if found["kind"] == "Pod" else found["spec"]["template"]["spec"]


def _containers(pod):
    return {each["name"]: each for each in [*pod.get("initContainers", ()), *pod["containers"]]}


def _sidecar(pod):
    return _containers(pod)["engram"]


def _config(pod):
    return load_config(
        environment={each["name"]: each["value"] for each in _sidecar(pod)["env"]},
    )


def _bytes(quantity):
    number, unit = re.fullmatch(r"(\d+)(\D*)", quantity).groups()
    return int(number) * UNITS[unit]


def test_the_sidecar_of_a_pod_starts_before_the_model():
    pod = MANIFESTS["pod.yaml"]["spec"]
    (first,) = pod["initContainers"]
    assert (first["name"], first["restartPolicy"]) == ("engram", "Always")
    assert "startupProbe" in first


def test_probes_ask_pages_that_there_are_where_the_kubelet_can(pod):
    sidecar, config = _sidecar(pod), _config(pod)
    assert config.http_public
    assert config.http.leaves_host, "the kubelet does not reach a pod's loopback"
    ports = {port["name"]: port["containerPort"] for port in sidecar["ports"]}
    endpoint = Endpoint(parse_http("127.0.0.1:0"))
    pages = set(endpoint._server._pages)
    endpoint.stop()
    asked = {}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = sidecar[probe]["httpGet"]
        assert ports[get["port"]] == config.http.port
        assert "host" not in get, "that would be the node's"
        asked[probe] = get["path"]
    assert set(asked.values()) <= pages
    # Not ready, as while it drains, is no reason to kill it.
    assert asked["livenessProbe"] == "/livez"
    start = sidecar["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= 300


def test_pods_wait_for_requests_that_run(pod):
    assert pod["terminationGracePeriodSeconds"] > _config(pod).limits.drain_seconds + 10


def test_memory_is_enough_for_a_restart_with_clients_that_hold_the_old_arena(pod):
    resources = _sidecar(pod)["resources"]
    assert _bytes(resources["limits"]["memory"]) >= 2 * _config(pod).ram + (1 << 30)
    assert _bytes(resources["requests"]["memory"]) > _config(pod).ram


def test_everything_is_mounted_where_it_is_looked_for(pod):
    config, sidecar = _config(pod), _sidecar(pod)
    image = dict(part.split("=", 1) for part in _last("ENV").split())
    mounts = {each["mountPath"]: each for each in sidecar["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {each["name"] for each in mounts.values()} <= volumes.keys()
    assert str(config.sockets[0].parent) in mounts
    assert image["ENGRAM_CACHE_DIR"] in mounts
    assert mounts[str(config.table[0].path.parent)]["readOnly"]
    assert "hostIPC" not in pod
    assert "shareProcessNamespace" not in pod


def test_clients_may_reach_the_sockets_and_attach():
    pod = MANIFESTS["pod.yaml"]["spec"]
    model, sidecar = _containers(pod)["model"], _sidecar(pod)
    assert model["securityContext"]["runAsUser"] in _config(pod).attach_uids
    assert pod["securityContext"]["fsGroup"] == sidecar["securityContext"]["runAsGroup"]
    assert model["volumeMounts"][0] in sidecar["volumeMounts"]


def test_the_sidecar_is_locked_in(pod):
    user, group = map(int, _last("USER").split(":"))
    context = _sidecar(pod)["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"]) == (user, group)
    assert not context["allowPrivilegeEscalation"]
    assert context["readOnlyRootFilesystem"]
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}


def test_a_directory_of_the_node_is_made_for_the_sidecar():
    pod = MANIFESTS["daemonset.yaml"]["spec"]["template"]["spec"]
    (made,) = _containers(pod)["directories"]["args"]
    context = _sidecar(pod)["securityContext"]
    owner = f"-o {context['runAsUser']} -g {context['runAsGroup']}"
    assert f"{owner} -m 2750 {_config(pod).sockets[0].parent}" in made
