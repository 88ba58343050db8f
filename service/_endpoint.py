"""`/livez`, `/readyz`, `/metrics` and the status page of a sidecar."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http import HTTPStatus
from importlib.resources import files

from engram.service._history import History
from engram.service._http import Answer, HttpServer, Page
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
        self._history: History | None = None
        self._server: HttpServer | None = None
        self.url = ""
        if address is not None:
            listener = bind_http(address)
            self.url = f"http://{address.host}:{listener.getsockname()[1]}/"
            pages: dict[str, Page] = {
                "/": self._status,
                "/livez": self._livez,
                "/readyz": self._readyz,
                "/metrics": self._show,
                "/history": self._past,
            }
            self._server = HttpServer(listener, pages)

    def ready(self, metrics: Exposition, history: History) -> None:
        """All tables are open and served; `history` is stopped with this."""
        self._metrics, self._history, self._state = metrics, history, "ready"

    def drain(self) -> None:
        """No new work is taken from now on."""
        self._state = "draining"

    def stop(self) -> None:
        """Close it. Safe to call twice."""
        if self._server is not None:
            self._server.stop()
        if self._history is not None:
            self._history.stop()

    def _livez(self, headers: Mapping[str, str]) -> Answer:
        return Answer(HTTPStatus.OK, b"alive\n")

    def _readyz(self, headers: Mapping[str, str]) -> Answer:
        ready = self._state == "ready"
        status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
        return Answer(status, f"{self._state}\n".encode())

    def _status(self, headers: Mapping[str, str]) -> Answer:
        page = files("engram.service").joinpath("status.html").read_bytes()
        return Answer(HTTPStatus.OK, page, "text/html; charset=utf-8")

    def _past(self, headers: Mapping[str, str]) -> Answer:
        return self._readyz(headers) if self._history is None else self._history.page(headers)

    def _show(self, headers: Mapping[str, str]) -> Answer:
        if self._metrics is None:
            return self._readyz(headers)
        return Answer(HTTPStatus.OK, *self._metrics(headers.get("accept", "")))
