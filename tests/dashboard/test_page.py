"""The page in a real browser, and the server behind it: what it shows, serves and refuses."""

import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from redpp_serve.cli import main
from redpp_serve.dashboard.server import check_urls, metrics_urls, page, serving
from redpp_serve.errors import RedppError
from redpp_serve.processes import started
from redpp_serve.serving.running import Running, register
from tests.support.browser import Browser
from tests.support.live_metrics import Exporter, while_down

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page reads of a packaged folder; nothing runs for it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "run"))
    report = {
        "name": "small",
        "verdict": f"The pruned network is faster. {HOSTILE}",
        "speedup": {"handler_p50": {"ratio": 1.9, "low": 1.8, "high": 2.0}},
    }
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return tmp_path / "small"


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    with Exporter() as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as made:
        yield made


def get(url: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=10) as reply:
            return reply.status, dict(reply.headers), reply.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def data(address: str) -> dict[str, Any]:
    return json.loads(get(f"{address}data.json")[2])


def table(browser: Browser, name: str) -> dict[str, list[str]]:
    """First cell of each row -> the others, as people see them."""
    rows = f"[...document.querySelectorAll('#{name} tr')].map(row => [...row.children].map(cell => cell.innerText))"
    return {first: rest for first, *rest in browser.evaluate(rows)}


def both(exporter: Exporter, times: int = 40) -> None:
    with exporter.lock:
        exporter.batches("original", 2, 0.0034, times)
        exporter.batches("pruned", 2, 0.0017, times)


@pytest.mark.browser
def test_the_page_shows_the_numbers_of_moving_counters(folder: Path, exporter: Exporter, browser: Browser) -> None:
    with serving(folder, urls=[exporter.url], every_s=0.1) as address:
        browser.open(address)
        browser.wait("document.querySelector('#headline').textContent.startsWith('No traffic')")
        assert browser.evaluate("document.querySelector('[data-curve=p50] svg').textContent") == "no traffic yet"
        assert browser.evaluate("document.querySelector('#speedups b').textContent") == "no traffic"
        both(exporter)
        browser.wait("document.querySelector('#headline').textContent.includes('times as fast')")
        latency, traffic, network = (table(browser, name) for name in ("latency", "traffic", "network"))
        # 3.4 and 1.7 ms lie in the buckets up to 4 and 2 ms: interpolation puts the median into their middle
        assert browser.evaluate("document.querySelector('#headline').textContent").startswith(
            "The pruned model answers 2.00 times as fast (p50, last "
        )
        assert latency["p50"] == ["3.42 ms\nbucket 2.83 to 4.00 ms", "1.70 ms\nbucket 1.41 to 2.00 ms", "2.00x"]
        assert latency["mean"] == ["3.40 ms", "1.70 ms", "2.00x"]
        assert latency["network alone, mean"] == ["2.55 ms", "1.27 ms", "2.00x"]
        assert traffic["errors (500)"] == ["0 of 80", "0 of 80"]
        assert traffic["mean batch size"] == ["2.00 requests", "2.00 requests"]
        assert network["parameters"] == ["2.00 k", "500", "25.0 % left"]
        with exporter.lock:
            exporter.batches("pruned", 2, 0.0017, 20, outcome="error")
        browser.wait("document.querySelector('#traffic').innerText.includes('40 of 120\\n33.33 % of requests')")
        assert browser.evaluate("document.querySelectorAll('[data-curve=p50] svg path.line').length") == 2
        colours = "['original', 'pruned'].map(n => getComputedStyle(document.querySelector(`path.line.${n}`)).stroke)"
        assert browser.evaluate(colours) == ["rgb(185, 86, 26)", "rgb(31, 102, 179)"]
        assert browser.evaluate("document.querySelector('#batches').textContent") == "2100.0 %100.0 %"
    assert browser.complaints == []
    assert {url.split("?")[0] for url in browser.requested} == {address, f"{address}data.json"}


@pytest.mark.browser
def test_the_page_goes_through_an_outage_and_sees_the_server_come_back(
    folder: Path, exporter: Exporter, browser: Browser
) -> None:
    with serving(folder, urls=[exporter.url], every_s=0.1) as address:
        both(exporter, 5)
        browser.open(address)
        browser.wait("document.querySelector('#status').innerText == 'live'")
        with while_down(exporter):
            browser.wait("document.querySelector('#status').innerText == 'server down'")
            browser.wait("document.querySelector('#headline').textContent == 'The server does not answer'")
            assert "refused" in browser.evaluate("document.querySelector('#sources').innerText")
            exporter.fresh()
        browser.wait("document.querySelector('#status').innerText == 'live'")
        both(exporter, 5)
        browser.wait("document.querySelector('#headline').textContent.includes('2.00 times as fast')")
    browser.wait("document.querySelector('#headline').textContent == 'The dashboard itself has ended'")
    assert [text for text in browser.complaints if "ERR_CONNECTION_REFUSED" not in text] == []


@pytest.mark.browser
def test_labels_and_reports_are_text_and_never_markup(folder: Path, exporter: Exporter, browser: Browser) -> None:
    label = HOSTILE.replace('"', '\\"')
    exporter.text = f'redpp_model_bytes{{model="{label}",variant="pruned"}} 1\n'.encode()
    with serving(folder, urls=[exporter.url], every_s=0.1) as address:
        browser.open(address)
        browser.wait("document.querySelector('#detail').textContent.includes('has metrics of')")
        assert "<img src=x onerror=" in browser.evaluate("document.querySelector('#detail').textContent")
        assert HOSTILE in browser.evaluate("document.querySelector('#compare-text').textContent")
        assert browser.evaluate("document.querySelectorAll('img').length") == 0
        assert browser.evaluate("document.querySelectorAll('script').length") == 1
        assert browser.evaluate("document.title") == "small: dashboard"
        # what got in nevertheless would be stopped by the policy
        browser.evaluate(
            "(() => { const s = document.createElement('script'); s.textContent = 'window.owned = 1';"
            " document.body.append(s); })()"
        )
        assert browser.evaluate("window.owned") is None
    assert any("Content Security Policy" in text for text in browser.complaints)


@pytest.mark.browser
def test_an_experiment_and_a_narrow_dark_window(folder: Path, exporter: Exporter, browser: Browser) -> None:
    for name, value, labels in (
        ("redpp_ab_traffic_ratio", 0.9, {"arm": "original"}),
        ("redpp_ab_traffic_ratio", 0.1, {"arm": "pruned"}),
        ("redpp_ab_speedup_ratio", 1.2, {"source": "shadow", "bound": "low"}),
        ("redpp_ab_speedup_ratio", 1.4, {"source": "shadow", "bound": "mean"}),
        ("redpp_ab_speedup_ratio", 1.6, {"source": "shadow", "bound": "high"}),
        ("redpp_ab_verdict", 1, {"kind": "faster"}),
        ("redpp_ab_advice", 1, {"kind": "promote"}),
    ):
        exporter.gauge(name, value, **labels)
    with serving(folder, urls=[exporter.url], every_s=0.1) as address:
        browser.open(address, width=400, scheme="dark")
        both(exporter)
        browser.wait("document.querySelector('#ab-intervals .whisker')")
        verdict = browser.evaluate("document.querySelector('#ab-verdict').textContent")
        assert verdict == "The pruned model is faster: 1.20 to 1.60 times as fast"
        assert browser.evaluate("document.querySelector('#ab-advice').textContent") == "Promote the pruned model"
        assert browser.evaluate("document.querySelector('#ab-share').textContent") == "original 90 %pruned 10 %"
        browser.wait("document.querySelector('#latency small')")
        assert browser.evaluate("document.documentElement.scrollWidth") == 400
        assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(15, 19, 25)"
        browser.evaluate("document.querySelectorAll('#windows button')[0].click()")
        browser.wait("document.querySelector('#windows button').getAttribute('aria-pressed') == 'true'")
    assert browser.complaints == []


def test_it_serves_the_page_and_its_data_to_this_machine_only(folder: Path, exporter: Exporter) -> None:
    with serving(folder, urls=[exporter.url]) as address:
        status, headers, body = get(address)
        assert status == 200 and body == page()[0]
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
        assert b"http://www.w3.org" in body and b"https://" not in body and b'src="' not in body
        assert get(f"{address}data.json?window=10")[0] == 200
        assert get(f"{address}data.json?window=11")[0] == 400
        assert get(f"{address}other")[0] == 404
        assert get(f"{address}data.json", Host="evil.example")[0] == 403
        assert get(f"{address}data.json", Host="localhost:1")[0] == 200
    with pytest.raises(urllib.error.URLError):
        get(address)
    assert not [thread for thread in threading.enumerate() if thread.name in ("page", "scrape")]


def test_a_port_in_use_is_named(folder: Path, exporter: Exporter, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        assert main(["dashboard", str(folder), "--port", str(port), "--metrics-url", exporter.url]) == 2
    assert f"port {port} is in use. Expected: a free port on 127.0.0.1." in capsys.readouterr().err


def test_without_a_running_server_it_says_how_to_start_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dashboard", str(folder)]) == 2
    said = capsys.readouterr().err
    assert f"no server is running for {folder}" in said and f"redpp-serve serve {folder}" in said
    assert main(["dashboard", str(folder / "missing"), "--metrics-url", "http://127.0.0.1:1/"]) == 2
    assert "is not a packaged model" in capsys.readouterr().err


def test_it_finds_the_server_that_runs_for_the_folder(folder: Path, exporter: Exporter) -> None:
    born = started(os.getpid())
    running = Running(
        str(folder),
        "small",
        "torchserve",
        os.getpid(),
        born,
        ("1.0", "2.0"),
        {},
        "",
        [exporter.url],
        {},
        extra={"ab_metrics": "http://127.0.0.1:1/metrics"},
    )
    with register(running):
        assert metrics_urls(folder) == [exporter.url, "http://127.0.0.1:1/metrics"]
        with serving(folder) as address:
            sources = {source["url"]: source["up"] for source in data(address)["sources"]}
            assert sources == {exporter.url: True, "http://127.0.0.1:1/metrics": False}
    with pytest.raises(RedppError, match="no server is running"), serving(folder):
        pass


def test_the_command_prints_the_address_and_ends_with_its_signal(
    folder: Path, exporter: Exporter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        for _ in range(200):
            if "dashboard http" in (said := capsys.readouterr().out):
                found.append(get(said.split()[1])[0])
                break
            time.sleep(0.02)
        os.kill(os.getpid(), 2)

    found: list[int] = []
    thread = threading.Thread(target=interrupt)
    thread.start()
    assert main(["dashboard", str(folder), "--metrics-url", exporter.url]) == 130
    thread.join()
    assert found == [200]


def test_an_address_that_is_none_is_refused_and_one_counts_once() -> None:
    for url in (
        "",
        "localhost:9400",
        "file:///etc/passwd",
        "http://",
        "http://a b/",
        "http://a\n/",
        "http://[/",
        "http://a:70000/",
    ):
        with pytest.raises(RedppError, match="--metrics-url"):
            check_urls([url])
    assert check_urls(["http://a/m", "http://b/m", "http://a/m"]) == ["http://a/m", "http://b/m"]
