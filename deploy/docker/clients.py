"""Send requests over kept connections until the server is gone, and count those that got no answer.

``python3 clients.py URL SAMPLE [--rate 40] [--clients 6] [--header "Name: value"]`` prints JSON; exit code 1 if any was
lost or refused. For Triton's URLs the sample is put into a request of its protocol. A refused connection ends a client:
nothing was sent, and a caller would ask another server.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import probe


def client(url: str, body: bytes, headers: dict[str, str], pause_s: float, counts: Counter[str]) -> None:
    """Ask again and again over one connection, and over a new one where the server closes it."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    while True:
        if connection.sock is None:
            try:
                connection.connect()
            except OSError:
                counts["gone"] += 1
                return
            counts["connections"] += 1
        try:
            connection.request("POST", parts.path, body, headers)
            answer = connection.getresponse()
            answer.read()
            counts["answered" if answer.status == 200 else f"status {answer.status}"] += 1
        except (OSError, http.client.HTTPException) as error:
            counts["lost"] += 1
            print(f"lost: {type(error).__name__}: {error}", file=sys.stderr)
            connection.close()
        time.sleep(pause_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("sample", type=Path)
    parser.add_argument("--rate", type=float, default=40.0, help="requests a second, of all clients together")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--header", action="append", default=[])
    options = parser.parse_args()
    counts: Counter[str] = Counter(answered=0, lost=0)
    headers = dict(header.split(": ", 1) for header in options.header)
    body = options.sample.read_bytes()
    if options.url.endswith("/infer"):
        body, more = probe.binary_request(options.url.removesuffix("/infer"), options.sample, 10.0)
        headers |= more
    pause_s = options.clients / options.rate
    arguments = (options.url, body, headers, pause_s, counts)
    threads = [threading.Thread(target=client, args=arguments) for _ in range(options.clients)]
    for thread in threads:
        thread.start()
        time.sleep(pause_s / len(threads))
    for thread in threads:
        thread.join()
    print(json.dumps(counts))
    wrong = sum(count for what, count in counts.items() if what == "lost" or what.startswith("status"))
    return 1 if wrong or not counts["answered"] else 0


if __name__ == "__main__":
    sys.exit(main())
