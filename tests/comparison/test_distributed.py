"""Load from many machines: blocks by the clock, workers' files, the figures that follow, and Locust itself."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redpp_serve.cli import main
from redpp_serve.comparison.client import Payload
from redpp_serve.comparison.distributed import (
    GUARD,
    Header,
    Notebook,
    Sent,
    compare_recorded,
    digest_of,
    order_of,
    read_recorded,
    turn_at,
)
from redpp_serve.comparison.payloads import folder_payloads
from redpp_serve.errors import RedppError
from redpp_serve.loopback import GatewayPorts, free_ports
from redpp_serve.options import ComparisonOptions
from tests.support.stubs import stub

LOCUSTFILE = Path(__file__).parents[2] / "deploy/load/locustfile.py"
URLS = ("http://127.0.0.1:1/predictions/small/1.0", "http://127.0.0.1:1/predictions/small/2.0")
USERS, BLOCK_S, FIRST = ("ann", "bob", "cem"), 0.5, 4_000_000_000


def test_machines_whose_clocks_agree_ask_the_same_version() -> None:
    arms = {}
    for k in range(4000):
        now = 1e9 + k * 0.01
        block, arm, opens, closes = turn_at(now, 2.0)
        arms[block] = arm
        assert now < closes and opens - now < 2.0 * 2 * GUARD + 1e-6, "a request waits longer than for a block's ends"
        assert opens == pytest.approx((block + GUARD) * 2.0) and closes - opens == pytest.approx(2.0 * (1 - 2 * GUARD))
    assert [arms[block] for block in sorted(arms)] == [(0, 1, 1, 0)[block % 4] for block in sorted(arms)]
    assert len(arms) >= 20


def test_a_user_sends_the_same_inputs_to_both_versions() -> None:
    first, same, next_pair, other = (
        list(islice(order_of(u, b, 5), 12)) for u, b in (("a", 6), ("a", 7), ("a", 8), ("b", 6))
    )
    assert first == same != next_pair and first != other
    assert sorted(first[:5]) == sorted(first[5:10]) == list(range(5)), "every input has its turn"


def answer(payload: int, arm: int) -> bytes:
    scores = [0.0] * 5
    scores[payload % 5 if arm == 0 or payload else 3] = 1.0 + arm
    return json.dumps({"outputs": [scores]}).encode()


def worker(
    folder: Path,
    name: str,
    payloads: list[Payload],
    users: tuple[str, ...],
    seconds: tuple[float, float],
    blocks: int = 60,
) -> Path:
    """A worker's file: each user asks one request after the other, in the time that the version takes."""
    path = folder / f"{name}.jsonl"
    with path.open("w") as file:
        notebook = Notebook(file, Header(digest_of(payloads), BLOCK_S, URLS, "torchserve"))
        noise = np.random.default_rng(len(users))
        for block in range(FIRST, FIRST + blocks):
            _, arm, opens, closes = turn_at((block + 0.5) * BLOCK_S, BLOCK_S)
            for user in users:
                now, turn, inputs = opens, 0, order_of(user, block, len(payloads))
                while now < closes:
                    payload, took = next(inputs), seconds[arm] * float(noise.uniform(0.9, 1.1))
                    failed = (block, turn, user) == (FIRST + 10, 1, "ann")
                    body = b'{"error": "as told"}' if failed else answer(payload, arm)
                    status = 500 if failed else 200
                    notebook.add(Sent(block, arm, user, turn, payload, now, took, took / 2, status), body)
                    now, turn = now + took, turn + 1
    return path


@pytest.fixture
def payloads(packaged: Path) -> list[Payload]:
    return folder_payloads(packaged)


@pytest.fixture
def records(packaged: Path, payloads: list[Payload], tmp_path: Path) -> Path:
    worker(tmp_path, "one", payloads, USERS[:2], (0.04, 0.02))
    worker(tmp_path, "two", payloads, USERS[2:], (0.04, 0.02))
    return tmp_path


def test_the_figures_of_what_workers_recorded(packaged: Path, records: Path) -> None:
    result = compare_recorded(packaged, [records], ComparisonOptions())
    assert result.speedup["end_to_end_p50"] and result.speedup["end_to_end_p50"].value == pytest.approx(2.0, rel=0.02)
    assert result.speedup["throughput"] and result.speedup["throughput"].value == pytest.approx(2.0, rel=0.05)
    assert result.original.latency_ms["p50"].value == pytest.approx(40, rel=0.02)
    assert result.original.handler_ms and result.original.handler_ms["p50"].value == pytest.approx(20, rel=0.02)
    assert result.pruned.throughput_rps == pytest.approx(3 / 0.02, rel=0.1)
    assert result.verdict.kind == "faster" and result.handler_verdict and result.handler_verdict.kind == "faster"
    assert result.concurrency == 3 and result.open_loop is None and result.gains == ()
    assert result.seconds == pytest.approx(28 * 2 * BLOCK_S * (1 - 2 * GUARD))
    failed = result.original.errors + result.pruned.errors
    assert failed == 1 and "as told" in result.original.first_error + result.pruned.first_error
    sent = sum(len(p.read_text().splitlines()) - 1 for p in records.glob("*.jsonl"))
    assert 0.9 * sent < result.original.requests + result.pruned.requests < sent, "a request is counted once"
    inputs = len(folder_payloads(packaged))
    assert result.agreement.inputs == inputs and result.agreement.top1 == pytest.approx(1 - 1 / inputs)
    assert result.conditions and result.conditions.server == "torchserve"
    assert result.conditions.time == time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime((FIRST + GUARD) * BLOCK_S))


def test_blocks_without_all_users_do_not_count(packaged: Path, payloads: list[Payload], tmp_path: Path) -> None:
    worker(tmp_path, "one", payloads, USERS[:2], (0.04, 0.02))
    late = worker(tmp_path, "two", payloads, USERS[2:], (0.04, 0.02))
    header, *lines = late.read_text().splitlines(keepends=True)
    late.write_text(
        header + "".join(line for line in lines if json.loads(line)["block"] >= FIRST + 20 or '"body":null' not in line)
    )
    found = read_recorded([tmp_path], payloads)
    full = {block for pair in found.pairs() for block in pair}
    assert min(full) >= FIRST + 19 and len(full) >= 36 and max(full) < FIRST + 59


def damaged(records: Path, line: str) -> None:
    with (records / "one.jsonl").open("a") as file:
        file.write(line)


def test_the_last_line_of_a_killed_worker_is_left_out(records: Path, payloads: list[Payload]) -> None:
    before = len(read_recorded([records], payloads).replies)
    damaged(records, '{"block": 12, "arm"')
    assert len(read_recorded([records], payloads).replies) == before


def sent(**changed: Any) -> str:
    return json.dumps({**asdict(Sent(FIRST, 0, "ann", 0, 0, FIRST * BLOCK_S, 1.0, None, 200)), **changed}) + "\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json\n", "line \\d+: Expecting value"),
        ("[]\n", "line \\d+"),
        (sent(arm=2), "numbers that no request has"),
        (sent(block=-1), "numbers that no request has"),
        (sent(turn=True), "numbers that no request has"),
        (sent(user=7), "a user or an error that is no text"),
        (sent(error=[1]), "a user or an error that is no text"),
        (sent(handler=True), "times that no request has"),
        (sent(start=9e11), "times that no request has"),
        (sent(start=FIRST * BLOCK_S - 1), "did not begin in its block"),
        (sent(block=10**30), "did not begin in its block"),
        (sent(arm=1), "the version that was not asked in its block"),
        (sent(body="abc"), "line \\d+: "),
        (sent(body="!!!!"), "line \\d+: "),
        (sent(body="é"), "line \\d+: "),
        (sent(body=5), "line \\d+: "),
        (sent(seconds=float("nan")), "times that no request has"),
        (sent(start="x"), "times that no request has"),
        (sent(more=1), "unexpected keyword"),
        (sent(payload=10**6, body=""), "without its body or of"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(records: Path, payloads: list[Payload], line: str, message: str) -> None:
    damaged(records, line)
    with pytest.raises(RedppError, match=message) as refusal:
        read_recorded([records], payloads)
    assert "one.jsonl" in refusal.value.found


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("block_s", 0, "blocks of 0 s"),
        ("block_s", "1", "blocks of '1' s"),
        ("block_s", True, "blocks of True s"),
        ("block_s", float("nan"), "blocks of nan s"),
        ("block_s", 1e300, "blocks of 1e\\+300 s"),
        ("urls", ["a", "b", "c"], "without the two URLs"),
        ("urls", [1, 2], "without the two URLs"),
        ("urls", "a", "without the two URLs"),
        ("server", ["x"], "server \\['x'\\]"),
        ("requests", 1, "without the two URLs"),
    ],
)
def test_a_damaged_header_is_refused(
    records: Path, payloads: list[Payload], key: str, value: Any, message: str
) -> None:
    first, *rest = (records / "one.jsonl").read_text().splitlines(keepends=True)
    (records / "one.jsonl").write_text("".join([json.dumps({**json.loads(first), key: value}) + "\n", *rest]))
    with pytest.raises(RedppError, match=f"line 1: .*{message}"):
        read_recorded([records], payloads)


def test_nothing_is_counted_twice(records: Path, payloads: list[Payload]) -> None:
    (records / "copy.jsonl").write_bytes((records / "one.jsonl").read_bytes())
    with pytest.raises(RedppError, match="which was read before"):
        read_recorded([records], payloads)
    with pytest.raises(RedppError, match="which was read before"):
        read_recorded([records / "one.jsonl", records / "one.jsonl"], payloads)


def test_files_that_do_not_belong_together_are_refused(
    records: Path, payloads: list[Payload], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(RedppError, match="was recorded with other inputs"):
        read_recorded([records], payloads[:-1])
    with pytest.raises(RedppError, match="no file ending in .jsonl in"):
        read_recorded([tmp_path_factory.mktemp("empty")], payloads)
    with pytest.raises(RedppError, match="nowhere.jsonl, line 1: .*No such file"):
        read_recorded([records / "nowhere.jsonl"], payloads)
    text = (records / "two.jsonl").read_text()
    (records / "two.jsonl").write_text(text.replace('"block_s":0.5', '"block_s":0.25', 1))
    with pytest.raises(RedppError, match="are of different runs"):
        read_recorded([records], payloads)
    (records / "two.jsonl").write_text(text.replace('"format":1', '"format":9', 1))
    with pytest.raises(RedppError, match="line 1: format 9, expected 1"):
        read_recorded([records], payloads)


def test_a_short_run_is_refused(payloads: list[Payload], tmp_path: Path) -> None:
    path = worker(tmp_path, "one", payloads, USERS, (0.04, 0.02), blocks=5)
    with pytest.raises(RedppError, match="1 pairs of blocks.*record for longer than 8 s"):
        read_recorded([path], payloads)


def test_bodies_are_written_once(payloads: list[Payload]) -> None:
    file = io.StringIO()
    notebook = Notebook(file, Header("", 1.0, URLS, "torchserve"))
    for body in (b"a", b"a", b"b", b"a"):
        notebook.add(Sent(1, 0, "u", 0, 0, 1.0, 1.0, None, 200), body)
    assert [json.loads(line)["body"] for line in file.getvalue().splitlines()[1:]] == ["YQ==", None, "Yg==", "YQ=="]


def test_compare_reads_them_and_what_makes_no_sense_beside_them_is_refused(
    packaged: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(packaged, tmp_path / "dist/small")  # what was found is written into it
    words = ["compare", str(folder), "--from-locust", str(records)]
    assert main([*words, "--require", "speedup>=1.5"]) == 0
    out, err = capsys.readouterr()
    assert "torchserve: " in out and "pruned is" in out and "speedup" in out
    assert "not measured with Locust: latency at a rate" in err and "clocks of the machines" in err
    assert main([*words, "--require", "speedup>=2.5"]) == 3
    assert main([*words, "--require", "rate_p99_ms<=5"]) == 2
    assert main([*words, "--rate", "5", "--workers", "2", "--sweep", "batch=1,2"]) == 2
    assert "--rate, --workers, --sweep beside --from-locust" in capsys.readouterr().err


@pytest.mark.server
@pytest.mark.skipif(find_spec("locust") is None, reason="Locust is not installed: pip install -e '.[load]'")
def test_a_master_and_two_workers(packaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against a server whose versions take 30 and 15 ms, on this machine alone."""
    inputs = folder_payloads(packaged)
    outputs = {payload.body: json.loads(answer(k, 0))["outputs"] for k, payload in enumerate(inputs)}

    def slow(path: str, body: bytes, headers: dict[str, str]) -> tuple[int, Any]:
        assert headers["authorization"] == "Bearer t" and headers["x-user-id"]
        time.sleep(0.03 if path.endswith("/1.0") else 0.015)
        return 200, {"outputs": outputs[body]}

    with stub(slow) as server:
        urls = [f"http://127.0.0.1:{server.port}/predictions/small/{version}" for version in ("1.0", "2.0")]
        port = str(free_ports(GatewayPorts).gateway)
        common = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE)]
        given = [
            "--package",
            str(packaged),
            "--original",
            urls[0],
            "--pruned",
            urls[1],
            "--header",
            "Authorization: Bearer t",
        ]
        given += ["--sticky-header", "X-User-Id", "--block", "0.4", "--record", str(tmp_path / "records")]
        master = [*common, "--master", "--master-bind-host", "127.0.0.1", "--master-bind-port", port, "--headless"]
        master += ["--users", "4", "--spawn-rate", "4", "--run-time", "12s", "--expect-workers", "2", *given]
        worker_ = [*common, "--worker", "--master-host", "127.0.0.1", "--master-port", port]
        environment = {**os.environ, "PYTHONPATH": str(LOCUSTFILE.parents[2])}
        workers = [subprocess.Popen(worker_, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        try:
            done = subprocess.run(master, env=environment, capture_output=True, text=True, timeout=90)
            assert done.returncode == 0, done.stderr[-3000:]
            told = [each.communicate(timeout=30)[1] for each in workers]
        finally:
            for each in workers:
                each.kill()
    files = list((tmp_path / "records").iterdir())
    assert len(files) == 2, told
    folder = shutil.copytree(packaged, tmp_path / "dist/small")
    assert main(["compare", str(folder), "--from-locust", str(tmp_path / "records"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["concurrency"] == 4 and found["original"]["errors"] == found["pruned"]["errors"] == 0
    assert 1.5 < found["speedup"]["end_to_end_p50"]["ratio"] < 2.3 and found["agreement"]["top1"] == 1.0
