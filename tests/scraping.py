"""Asking a sidecar's HTTP, as probes and Prometheus do."""

from __future__ import annotations

from http.client import HTTPConnection

from prometheus_client.openmetrics.parser import text_string_to_metric_families

OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


def ask(place, path, method="GET", timeout_s=10.0, **headers):
    """(status, body, media type) of what `HOST:PORT` answers."""
    host, _, port = place.rpartition(":")
    connection = HTTPConnection(host, int(port), timeout=timeout_s)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers["Content-Type"]
    finally:
        connection.close()


def families_at(place):
    """All metrics, parsed strictly, by name."""
    status, body, kind = ask(place, "/metrics", Accept=OPEN_METRICS)
    assert status == 200, body
    assert kind.startswith("application/openmetrics-text")
    return {family.name: family for family in text_string_to_metric_families(body)}


def samples_at(place):
    """Values by name and labels, sorted as `key` does."""
    return {
        key(sample.name, **sample.labels): sample.value
        for family in families_at(place).values()
        for sample in family.samples
    }


def key(name, **labels):
    """Name and labels of a sample."""
    return name, tuple(sorted(labels.items()))
