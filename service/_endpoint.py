"""`/livez`, `/readyz` and `/metrics` of a sidecar."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http import HTTPStatus

from engram.service._http import Answer, HttpServer
from engram.service.sockets import Address, bind_http

Exposition = Callable[[str], tuple[bytes, str]]
"""Given what a client accepts, the metrics and their media type."""


class Endpoint:
    """Answers probes from construction, before any table is opened, to `stop`.

    Args:
        address: where; None for nowhere.

    Raises:
        ConfigError: the address cannot be had.
    """

    def __init__(self, address: Address | None) -> None:
        self._state = "starting"
        self._metrics: Exposition | None = None
        self._server: HttpServer | None = None
        self.url = ""
        if address is not None:
            listener = bind_http(address)
            self.url = f"http://{address.host}:{listener.getsockname()[1]}/metrics"
            pages = {"/livez": self._livez, "/readyz": self._readyz, "/metrics": self._show}
            self._server = HttpServer(listener, pages)

    def ready(self, metrics: Exposition) -> None:
        """All tables are open and served."""
        self._metrics, self._state = metrics, "ready"

    def drain(self) -> None:
        """No new work is taken from now on."""
        self._state = "draining"

    def stop(self) -> None:
        """Close it. Safe to call twice."""
        if self._server is not None:
            self._server.stop()

    def _livez(self, headers: Mapping[str, str]) -> Answer:
        return Answer(HTTPStatus.OK, b"alive\n")

    def _readyz(self, headers: Mapping[str, str]) -> Answer:
        ready = self._state == "ready"
        status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
        return Answer(status, f"{self._state}\n".encode())

    def _show(self, headers: Mapping[str, str]) -> Answer:
        if self._metrics is None:
            return self._readyz(headers)
        return Answer(HTTPStatus.OK, *self._metrics(headers.get("accept", "")))
