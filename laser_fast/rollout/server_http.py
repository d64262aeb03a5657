"""JSON over HTTP to a vLLM server, with deadlines, retries and an end that waits for nobody."""

import json
import logging
import os
import socket
import threading
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from laser_fast.config_errors import RunError, reading

logger = logging.getLogger(__name__)

API_KEY = "VLLM_API_KEY"  # the variable from which a vLLM server takes its own --api-key
ATTEMPTS = 3
_PAUSE_S = 1.0  # before the second attempt; twice as long before the third
# A request may wait for half an hour; what lies between forgets silent connections sooner.
_KEEPALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
if hasattr(socket, "TCP_KEEPIDLE"):  # on Linux; seconds
    _KEEPALIVE += [(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)]
    _KEEPALIVE += [(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 30)]


class ServerError(RunError):
    """The server is gone, late or no longer holds the weights; resume from a checkpoint."""


class Http:
    """JSON over HTTP to one server, with a deadline and a few attempts; from any thread."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = url.rstrip("/")
        with reading("rollout.server_url"):
            parts = urlsplit(self._url)
        self._connection = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._host, self._path = parts.netloc, parts.path
        self._timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json"}
        if key := os.environ.get(API_KEY):
            self._headers["Authorization"] = f"Bearer {key}"
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()  # of the requests in flight
        self._closed = threading.Event()

    def get(self, path: str) -> Any:
        """The answer to a GET."""
        return self._ask("GET", path, None, ATTEMPTS)

    def post(
        self, path: str, fields: dict[str, Any] | None = None, *, attempts: int = ATTEMPTS
    ) -> Any:
        """The answer to a POST of a JSON object; None if it is empty.

        One attempt is right for what must not happen twice. What the server refuses is a
        ValueError; a ServerError says that no attempt was answered.
        """
        return self._ask("POST", path, json.dumps(fields or {}).encode(), attempts)

    def close(self) -> None:
        """Hang up on every request in flight; its caller gets a ServerError."""
        with self._lock:
            self._closed.set()
            for connection in self._sockets:
                with suppress(OSError):  # the other side was faster
                    connection.shutdown(socket.SHUT_RDWR)

    def own_address(self) -> str:
        """The address of this machine on its way to the server, which can answer there."""
        connection = self._connection(self._host, timeout=self._timeout_s)
        with socket.create_connection((connection.host, connection.port), self._timeout_s) as own:
            return own.getsockname()[0]

    def _ask(self, method: str, path: str, body: bytes | None, attempts: int) -> Any:
        url = self._url + path
        for attempt in range(1, attempts + 1):
            try:
                status, text = self._exchange(method, path, body)
            except (OSError, HTTPException) as error:  # refused, reset, late or cut off
                self._check_open()
                reason = str(error)
                if isinstance(error, TimeoutError):  # another wait as long would end no better
                    break
            else:
                if status < 300:
                    return json.loads(text) if text.strip() else None
                reason = f"{status} {text.decode(errors='replace')[:300]}"
                if status < 500:
                    raise ValueError(f"{url} refused: {reason}")
            logger.warning("%s: attempt %d failed: %s", url, attempt, reason)
            if attempt < attempts and self._closed.wait(attempt * _PAUSE_S):
                self._check_open()
        raise ServerError(
            f"{url} did not answer in {attempt} attempts of up to {self._timeout_s:g} s: "
            f"{reason}; restart the server and resume from the last checkpoint"
        )

    def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        """Send one request and wait for its answer: status and body."""
        connection = self._connection(self._host, timeout=self._timeout_s)
        connection.connect()
        own = connection.sock
        for option in _KEEPALIVE:
            own.setsockopt(*option)
        try:
            with self._lock:
                self._check_open()
                self._sockets.add(own)
            connection.request(method, self._path + path, body, self._headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            with self._lock:
                self._sockets.discard(own)
            connection.close()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise ServerError(f"the connection to {self._url} was closed")
