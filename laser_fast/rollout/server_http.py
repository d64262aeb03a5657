"""JSON over HTTP to a vLLM server, with deadlines and retries."""

from __future__ import annotations

import json
import logging
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

logger = logging.getLogger(__name__)

ATTEMPTS = 3


class ServerError(RuntimeError):
    """The server is gone, late or no longer holds the weights; resume from a checkpoint."""


class Http:
    """JSON over HTTP to one server, with a deadline and a few attempts."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._opener = build_opener(ProxyHandler({}))  # the server is ours, not the internet's

    def get(self, path: str) -> Any:
        """The answer to a GET."""
        return self._ask(Request(self._url + path))

    def post(
        self, path: str, fields: dict[str, Any] | None = None, *, attempts: int = ATTEMPTS
    ) -> Any:
        """The answer to a POST of a JSON object; None if it is empty.

        One attempt is right for what must not happen twice.

        Raises:
            ServerError: no answer, or a failure of the server, after several attempts.
            ValueError: the server refused the request; sending it again would not help.
        """
        body = json.dumps(fields or {}).encode()
        request = Request(self._url + path, body, {"Content-Type": "application/json"})
        return self._ask(request, attempts)

    def _ask(self, request: Request, attempts: int = ATTEMPTS) -> Any:
        for attempt in range(1, attempts + 1):
            try:
                with self._opener.open(request, timeout=self._timeout_s) as answer:
                    text = answer.read()
                return json.loads(text) if text.strip() else None
            except HTTPError as error:
                reason = f"{error.code} {error.read().decode(errors='replace')[:300]}"
                if error.code < 500:
                    raise ValueError(f"{request.full_url} refused: {reason}") from None
            except (OSError, HTTPException) as error:  # refused, reset, late or cut off
                reason = str(error)
            logger.warning("%s: attempt %d failed: %s", request.full_url, attempt, reason)
        raise ServerError(
            f"{request.full_url} did not answer in {attempts} attempts of up to "
            f"{self._timeout_s:g} s: {reason}; restart the server and resume from the last "
            "checkpoint"
        )
