"""Tell a chat or pager what an A/B test decides: JSON with a ``text``, as Slack and Mattermost take it.

Whatever becomes of a message, the experiment goes on: messages are sent by a thread of their own, tried a few times,
and given up.
"""

from __future__ import annotations

import http.client
import json
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from urllib.parse import urlsplit

from redpp_serve.errors import RedppError, printable

TRIES = 3
_TIMEOUT_S, _PAUSE_S, _MOST_WAITING = 5.0, 2.0, 100


def check_webhook(url: str) -> None:
    """Refuse what is no address to post to.

    Raises:
        RedppError: it is none; the message does not repeat it, since such addresses hold secrets.
    """
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        sound = False
    if not sound or not url.isascii() or not url.isprintable() or " " in url:
        raise RedppError(
            "--webhook with what is no URL",
            "http:// or https:// with a host and a path",
            "copy it from the chat, for example --webhook https://chat.example.com/hooks/KEY",
        )


def host_of(url: str) -> str:
    """Return an address without what is secret in it: scheme and host."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}"


class Webhook:
    """Sends texts to an address one after the other, in a thread of its own.

    Args:
        url: where to post, see `check_webhook`.
        complain: takes a line about a message that could not be delivered.
        pause_s: seconds from one try to the next.
    """

    def __init__(self, url: str, complain: Callable[[str], None], pause_s: float = _PAUSE_S) -> None:
        self._url, self._complain, self._pause_s = url, complain, pause_s
        self._waiting: queue.Queue[str | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._send_all, name="webhook", daemon=True)
        self._thread.start()

    def tell(self, text: str) -> None:
        """Send a text soon; return at once."""
        try:
            self._waiting.put_nowait(text)
        except queue.Full:
            self._complain("the webhook answers too slowly: a message was left out")

    def close(self, patience_s: float = _TIMEOUT_S) -> None:
        """Send what waits, for so many seconds at most."""
        try:
            self._waiting.put(None, timeout=patience_s)
        except queue.Full:
            return
        self._thread.join(patience_s)

    def _send_all(self) -> None:
        while (text := self._waiting.get()) is not None:
            problem = ""
            for k in range(TRIES):
                if k:
                    time.sleep(self._pause_s)
                if not (problem := _post(self._url, text)):
                    break
            if problem:
                self._complain(f"the webhook was not told in {TRIES} tries: {problem}")


def _post(url: str, text: str) -> str:
    """Post a text; return what went wrong, without the address, which holds a secret; empty if nothing did."""
    body = json.dumps({"text": printable(text)}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S):
            return ""
    except urllib.error.HTTPError as error:
        error.close()
        return f"it answers {error.code}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return type(getattr(error, "reason", error)).__name__
