"""HTTP for probes and metrics: one thread for all connections, short requests, short patience.

Who connects may be slow, silent or hostile. A connection costs a descriptor and a few KiB for some
seconds at most, and the oldest makes room for the newest, so nobody can hold up the sidecar or keep
others from an answer. Each page has a thread of its own: one that takes long delays no other.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus

from engram.errors import EngramError

REQUEST_BYTES_MAX = 8192
CONNECTION_S = 5.0
"""Time that a connection has from its beginning to the last byte of its answer."""
CONNECTIONS_MAX = 64
"""Open at once; fewer where the process may have few descriptors, which clients need, too."""
_SHARE_OF_DESCRIPTORS = 8
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)
"""Pages may ask this server, and nobody else."""
TEXT = "text/plain; charset=utf-8"

_log = logging.getLogger("engram.service")


@dataclass(frozen=True)
class Answer:
    """What a page says.

    Attributes:
        kind: media type of the body.
    """

    status: HTTPStatus
    body: bytes
    kind: str = TEXT


Page = Callable[[Mapping[str, str]], Answer]
"""Answers a request whose headers are given, by name in lower case."""


class HttpServer:
    """Serves pages by path, from construction to `stop`.

    Args:
        listener: becomes the server's own.
    """

    def __init__(self, listener: socket.socket, pages: Mapping[str, Page]) -> None:
        self._listener = listener
        self._pages = dict(pages)
        self._threads = {
            path: ThreadPoolExecutor(1, thread_name_prefix="engram-http") for path in pages
        }
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = max(2, min(CONNECTIONS_MAX, descriptors // _SHARE_OF_DESCRIPTORS))
        self._open: dict[asyncio.Task[None], None] = {}
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="engram-http", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close everything. Safe to call twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._over.set)
            self._thread.join()
        for thread in self._threads.values():
            thread.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(
            self._connected, sock=self._listener, limit=REQUEST_BYTES_MAX, backlog=self._most
        )
        await self._over.wait()
        server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = None
        if len(self._open) > self._most:
            next(iter(self._open)).cancel()
        try:
            async with asyncio.timeout(CONNECTION_S):
                writer.write(await self._reply(reader))
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, asyncio.CancelledError):
            pass  # it had its time, or left, or made room for another
        finally:
            del self._open[task]
            writer.transport.abort()

    async def _reply(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return b""
        except asyncio.LimitOverrunError:
            return _packed(_said(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE))
        line, *fields = head.decode("latin-1").split("\r\n")
        words = line.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return _packed(_said(HTTPStatus.BAD_REQUEST))
        method, target, _ = words
        if method not in ("GET", "HEAD"):
            return _packed(_said(HTTPStatus.METHOD_NOT_ALLOWED))
        parts = (field.partition(":") for field in fields)
        headers = {name.strip().lower(): value.strip() for name, _, value in parts}
        answer = await self._answer(target.partition("?")[0], headers)
        return _packed(answer, body=method == "GET")

    async def _answer(self, path: str, headers: Mapping[str, str]) -> Answer:
        page = self._pages.get(path)
        if page is None:
            return _said(HTTPStatus.NOT_FOUND)
        try:
            return await self._loop.run_in_executor(self._threads[path], page, headers)
        except EngramError as error:
            return Answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode())
        except Exception as error:
            _log.error("the page %s failed", path, exc_info=error)
            return _said(HTTPStatus.INTERNAL_SERVER_ERROR)


def _said(status: HTTPStatus) -> Answer:
    return Answer(status, f"{status.phrase}\n".encode())


def _packed(answer: Answer, *, body: bool = True) -> bytes:
    head = (
        f"HTTP/1.1 {answer.status.value} {answer.status.phrase}\r\n"
        f"Content-Type: {answer.kind}\r\nContent-Length: {len(answer.body)}\r\n"
        f"X-Content-Type-Options: nosniff\r\nContent-Security-Policy: {_POLICY}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + (answer.body if body else b"")
