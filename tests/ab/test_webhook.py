"""Texts for a chat or pager: what is posted, and that nothing that becomes of them is felt."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from redpp_serve.ab.webhook import TRIES, Webhook, check_webhook, host_of
from redpp_serve.errors import RedppError


class Chat(HTTPServer):
    """Takes posts; answers with ``statuses`` one after the other, then 200."""

    def __init__(self) -> None:
        self.texts: list[object] = []
        self.statuses: list[int] = []
        super().__init__(("127.0.0.1", 0), Post)
        self.url = f"http://127.0.0.1:{self.server_port}/hooks/secret"


class Post(BaseHTTPRequestHandler):
    server: Chat

    def do_POST(self) -> None:
        assert self.headers["Content-Type"] == "application/json" and self.path == "/hooks/secret"
        self.server.texts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def chat() -> Iterator[Chat]:
    server = Chat()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def told(url: str, *texts: str) -> tuple[list[str], float]:
    """(complaints, seconds that telling took)."""
    complaints: list[str] = []
    webhook = Webhook(url, complaints.append, pause_s=0.01)
    begun = time.monotonic()
    for text in texts:
        webhook.tell(text)
    seconds = time.monotonic() - begun
    webhook.close()
    return complaints, seconds


def test_texts_arrive_in_order_as_one_printable_line(chat: Chat) -> None:
    assert told(chat.url, "first", "sec\x1bond\nline", "third")[0] == []
    assert chat.texts == [{"text": "first"}, {"text": "sec\ufffdond line"}, {"text": "third"}]


def test_a_text_is_posted_again_where_it_was_refused(chat: Chat) -> None:
    chat.statuses = [503, 500]
    assert told(chat.url, "first", "second")[0] == []
    assert chat.texts == [{"text": "first"}] * 3 + [{"text": "second"}]


def test_what_cannot_be_delivered_is_complained_of_without_the_secret(chat: Chat) -> None:
    chat.statuses = [404] * TRIES
    (complaint,) = told(chat.url, "first", "second")[0]
    assert "404" in complaint and "secret" not in complaint and chat.texts[-1] == {"text": "second"}


def test_an_address_where_nobody_answers_delays_nothing(chat: Chat) -> None:
    chat.shutdown()
    chat.server_close()
    complaints, seconds = told(chat.url, *["text"] * 200)
    assert complaints and not any("secret" in complaint for complaint in complaints)
    assert seconds < 3, "each text waited for its own tries, 20 ms"


def test_what_is_no_url_is_refused() -> None:
    for url in ("", "chat.example.com/hook", "ftp://host/x", "http://", "https:///x", "http://h:99999/", "http://h/a b",
                "file:///etc/passwd", "http://[::1", "http://h/\x1b", "slack"):  # fmt: skip
        with pytest.raises(RedppError, match="--webhook"):
            check_webhook(url)
    for url in ("http://127.0.0.1:80/x", "https://chat.example.com/hooks/key?a=b"):
        check_webhook(url)
    assert host_of("https://user:pass@chat.example.com:8443/hooks/key") == "https://chat.example.com"
