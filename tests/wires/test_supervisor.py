"""What the supervisor of an A/B test writes is what `ab status` and the exporter read."""

import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from redpp_serve.ab.counts import Counting, scrape
from redpp_serve.ab.exporter import registry
from redpp_serve.ab.gateway import divide, set_split, switch
from redpp_serve.ab.journal import Journal
from redpp_serve.ab.shadow import Pair, RecorderCounts
from redpp_serve.ab.spec import Spec, Started, parse_split
from redpp_serve.ab.state import GATEWAY, PAIRS, RECORDER, SPEC, write_json
from redpp_serve.ab.status import Status, read_status
from redpp_serve.ab.supervisor import Parts, Watch
from redpp_serve.logs import reopen_logs
from tests.support.live_metrics import Exporter

URLS = {"gateway": "http://127.0.0.1:1/predictions/m", "metrics": "http://127.0.0.1:2/metrics"}


def users(log: Path, arm: str, count: int, status: int = 200, by: str = "split") -> None:
    line = {"arm": arm, "answered_by": arm, "admitted": True, "status": status, "upstream_time": 0.012, "chosen_by": by}
    line |= {"step": "0"}
    with log.open("a") as file:
        file.write((json.dumps(line) + "\n") * count)


def pairs(state: Path, count: int) -> None:
    pair = Pair(1.0, "id", "pruned", True, [200, 200], [0.010, 0.008], [0.009, 0.007], 0.01, True)
    with (state / PAIRS).open("a") as file:
        file.write((json.dumps(asdict(pair)) + "\n") * count)


def without_time(status: Status) -> dict[str, Any]:
    return {key: value for key, value in status.to_json().items() if key != "seconds"}


def test_status_and_exporter_read_what_the_supervisor_writes(tmp_path: Path) -> None:
    log = tmp_path / GATEWAY / "access.log"
    log.parent.mkdir()
    divide(log.parent)
    set_split(log.parent, parse_split("75:25"))
    test = Started(Spec(tmp_path, None, "torchserve", parse_split("75:25"), None, True), "small", time.time())
    write_json(tmp_path / SPEC, test.to_json())
    with Exporter() as server:
        counting = Counting(tmp_path, log, partial(scrape, server.url, "small"))
        gateway = SimpleNamespace(folder=log.parent)
        processes: Any = SimpleNamespace(
            check_alive=lambda: None,
            alive=lambda: True,
            rotate=lambda: False,
            handover=lambda: None,
            reaches_folder=lambda: True,
            gateway=gateway,
            access_log=log,
        )
        journal = Journal(tmp_path / "journal.json", test, tmp_path, tmp_path / "logs", "salt", "probe")
        watch = Watch(journal, URLS, counting, Parts(processes, processes), reopen_logs(tmp_path / "logs", "text"))
        for look in range(24):
            for variant, seconds in (("original", 0.010), ("pruned", 0.005)):
                server.batches(variant, 2, seconds, times=20 + look)
            users(log, "original", 30)
            users(log, "pruned", 9)
            users(log, "pruned", 1, 500)
            users(log, "pruned", 1, by="header")
            pairs(tmp_path, 10)
            write_json(tmp_path / RECORDER, asdict(RecorderCounts(12 * (look + 1), 2 * (look + 1), 10 * (look + 1))))
            watch.look()
            assert watch.latest is not None
            there = read_status(tmp_path, test, URLS)
            assert without_time(there) == without_time(watch.latest), look
    arms = there.arms
    assert (arms["original"].requests, arms["pruned"].requests, arms["pruned"].errors) == (720, 264, 24)
    assert arms["pruned"].by_header == 24 and arms["pruned"].gateway_ms["p50"] == 12
    assert arms["original"].handler_ms["p50"] is not None and there.problems == []
    assert there.shadow and (there.shadow.pairs, there.shadow.dropped, there.shadow.agreement) == (240, 48, 1.0)
    assert [finding.source for finding in there.findings] == ["shadow", "shadow", "split"]
    assert "in 23 windows" in there.findings[2].verdict.text
    switch(tmp_path / GATEWAY, "pruned")
    there = read_status(tmp_path, test, URLS)
    assert there.all_to == "pruned"

    text = generate_latest(registry(lambda: there)).decode()
    exported = {
        frozenset((sample.name, *sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert exported[frozenset(("redpp_ab_requests_total", "small", "original"))] == 720
    assert exported[frozenset(("redpp_ab_requests_total", "small", "pruned"))] == 264
    assert exported[frozenset(("redpp_ab_traffic_ratio", "small", "pruned"))] == 1
    assert exported[frozenset(("redpp_ab_pairs_total", "small"))] == 240
    assert exported[frozenset(("redpp_ab_dropped_total", "small"))] == 48
    assert exported[frozenset(("redpp_ab_agreement_ratio", "small"))] == 1
    assert exported[frozenset(("redpp_ab_advice", "small", there.advice.kind))] == 1
    faster = there.findings[0].verdict
    assert faster.kind == "faster"
    assert exported[frozenset(("redpp_ab_speedup_ratio", "small", "shadow", "mean"))] == faster.mean
    assert exported[frozenset(("redpp_ab_verdict", "small", "faster"))] == 1
