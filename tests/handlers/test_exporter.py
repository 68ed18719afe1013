"""The exporter as a process: it serves what workers wrote, on loopback, and ends on SIGTERM."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from redpp_serve.loopback import Ports, free_ports
from tests.handlers.test_metrics import work


def scrape(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(150):
        try:
            return opener.open(url, timeout=5).read().decode()
        except urllib.error.URLError:
            time.sleep(0.1)
    return pytest.fail("the exporter does not answer")


def test_it_serves_the_metrics_of_workers_until_it_is_told_to_end(tmp_path: Path) -> None:
    port = free_ports(Ports).exporter
    command = [sys.executable, "-m", "redpp_serve.handlers.exporter", "--port", str(port), "--dir", str(tmp_path)]
    process = subprocess.Popen(command)
    try:
        assert "redpp_requests_total" not in scrape(f"http://127.0.0.1:{port}/metrics")
        work(tmp_path, "1.0", "original")
        text = scrape(f"http://127.0.0.1:{port}/metrics")
        assert 'redpp_requests_total{model="digits",outcome="ok",variant="original",version="1.0"} 2.0' in text
        assert "redpp_worker_resident_bytes{" not in text and "pid=" not in text  # that worker has ended
        process.terminate()
        assert process.wait(timeout=10) == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=1)
    finally:
        process.kill()
        process.wait()


def test_importing_it_costs_neither_torch_nor_prometheus() -> None:
    code = "import sys, redpp_serve.handlers.exporter;sys.exit(bool({'torch', 'prometheus_client'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
