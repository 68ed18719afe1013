"""Times kept between runs: whatever lies in their place, and however many workers start together."""

import json
import math
import os
import threading
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from redpp_serve.runtime import plan_cache
from redpp_serve.runtime.plan import Timing
from redpp_serve.runtime.plan_cache import SHIPPED, VARIABLE, PlanCache, default_path, device_key, merge

KEY = "a device, fp32"
TIMES = {"op=a x=1x2": {"dense": Timing(2e-3, 1.0), "fused": Timing(1e-3, 0.6), "split": Timing(math.inf, math.inf)}}
ENTRY = {"format": 1, "entries": {KEY: {"s": {"dense": [1e-3, 1.0]}}}}


def test_times_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "plans.json"
    PlanCache(path).add(KEY, TIMES)
    assert PlanCache(path).find(KEY, "op=a x=1x2") == (TIMES["op=a x=1x2"], "cached")
    assert PlanCache(path).find(KEY, "op=b") is None and PlanCache(path).find("another device", "op=a x=1x2") is None
    assert not list(path.parent.glob(".*"))  # temporary files


def test_what_others_wrote_stays(tmp_path: Path) -> None:
    first, second = PlanCache(tmp_path / "p"), PlanCache(tmp_path / "p")
    first.add(KEY, {"one": TIMES["op=a x=1x2"]})
    second.add(KEY, {"two": TIMES["op=a x=1x2"]})
    second.add("other", TIMES)
    found = PlanCache(tmp_path / "p")
    assert found.find(KEY, "one") and found.find(KEY, "two") and found.find("other", "op=a x=1x2")
    again = {"dense": Timing(5e-3, 1.0)}
    first.add(KEY, {"two": again})  # taken again: the newer one counts
    assert PlanCache(tmp_path / "p").find(KEY, "two") == (again, "cached")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '{"format": 1}',
        '{"format": 1, "entries": []}',
        '{"format": 1, "entries": {"a": 1}}',
        '{"format": 1, "entries": {"a": {"b": {"dense": [-1, 1]}}}}',
        '{"format": 1, "entries": {"a": {"b": {"dense": [0, 1]}}}}',
        '{"format": 1, "entries": {"a": {"b": {"dense": [1, 0]}}}}',
        '{"format": 1, "entries": {"a": {"b": {"dense": [1, Infinity]}}}}',
        '{"format": 1, "entries": {"a": {"b": {"dense": [NaN, 1]}}}}',
        '{"format": 1, "entries": {"a": {"b": {"dense": ["x", 1]}}}}',
        '{"format": 1, "entries": {"a": {"b": {"dense": [1]}}}}',
        "[" * 100_000,
        "\ud800",
        '{"format": 1, "entries": {"a": {"b": {"dense": [1%s, 1]}}}}' % ("0" * 400),
    ],
)
def test_a_damaged_file_is_ignored_and_written_anew(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "plans.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    cache = PlanCache(path)
    assert str(path) in caplog.text and "taken again" in caplog.text
    cache.add(KEY, TIMES)
    assert PlanCache(path).find(KEY, "op=a x=1x2")


def test_another_format_and_a_huge_file_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    path.write_text(json.dumps(ENTRY))
    assert PlanCache(path).find(KEY, "s")
    with patch.object(plan_cache, "MOST_BYTES", 10):
        assert PlanCache(path).find(KEY, "s") is None
    path.write_text(json.dumps({**ENTRY, "format": 2}))
    assert PlanCache(path).find(KEY, "s") is None


def test_what_is_no_file_is_neither_read_nor_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(tmp_path / "pipe")  # reading it would never end
    for path in (tmp_path / "pipe", tmp_path):
        cache = PlanCache(path)
        with cache.locked(wait_s=1):
            cache.add(KEY, TIMES)
        assert cache.find(KEY, "op=a x=1x2") and not path.is_file() and str(path) in caplog.text


def test_a_link_stays_and_where_it_leads_is_written(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "plans.json").symlink_to(tmp_path / "shared" / "plans.json")
    PlanCache(tmp_path / "plans.json").add(KEY, TIMES)
    assert (tmp_path / "plans.json").is_symlink() and PlanCache(tmp_path / "shared" / "plans.json").find(
        KEY, "op=a x=1x2"
    )


def test_a_pipe_with_the_locks_name_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "plans.json.lock")  # opening it would wait for a reader
    entered = threading.Event()

    def hold() -> None:
        with PlanCache(tmp_path / "plans.json").locked(wait_s=1):
            entered.set()

    threading.Thread(target=hold, daemon=True).start()
    assert entered.wait(10)


def test_a_place_that_cannot_be_written_keeps_times_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache = PlanCache(tmp_path / "file" / "plans.json")  # not even root can write here
    with cache.locked(wait_s=1):
        cache.add(KEY, TIMES)
    assert cache.find(KEY, "op=a x=1x2") and "not kept" in caplog.text


def test_measured_here_goes_before_shipped(tmp_path: Path) -> None:
    table, path = tmp_path / "table.json", tmp_path / "plans.json"
    assert merge(table, {KEY: TIMES}) == 1
    assert merge(table, {KEY: {"more": TIMES["op=a x=1x2"]}, "other": TIMES}) == 3
    assert PlanCache(path, shipped=table).find(KEY, "more") == (TIMES["op=a x=1x2"], "shipped")
    mine = {"more": {"dense": Timing(1.0, 1.0)}}
    PlanCache(path, shipped=table).add(KEY, mine)
    assert PlanCache(path, shipped=table).find(KEY, "more") == (mine["more"], "cached")
    assert (
        KEY not in json.loads(table.read_text())["entries"]["other"]
        and PlanCache(path).find("other", "op=a x=1x2") is None
    )


def test_the_shipped_table_is_readable(caplog: pytest.LogCaptureFixture) -> None:
    PlanCache(None, SHIPPED)
    assert json.loads(SHIPPED.read_text())["format"] == plan_cache.FORMAT and not caplog.text


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "mine.json"))
    assert default_path() == tmp_path / "mine.json"
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "redpp-serve" / "plans.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".cache" / "redpp-serve" / "plans.json"
    with patch.object(Path, "home", side_effect=RuntimeError("no home")):
        assert default_path() is None


def test_the_key_names_all_that_times_depend_on() -> None:
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    key = device_key(cpu, "fp32")
    assert torch.__version__ in key and "kernels " in key and key != device_key(cpu, "bf16")
    with patch.object(torch, "get_num_threads", return_value=threads + 1):
        assert device_key(cpu, "fp32") != key


def test_a_held_lock_is_waited_for_but_not_for_ever(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "plans.json"
    with PlanCache(path).locked(wait_s=1):
        start = time.monotonic()
        with PlanCache(path).locked(wait_s=0.2):
            assert 0.2 <= time.monotonic() - start < 5 and "another worker" in caplog.text
    start = time.monotonic()
    with PlanCache(path).locked(wait_s=30):
        assert time.monotonic() - start < 5


def test_a_file_system_without_locks_costs_no_wait(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start = time.monotonic()
    no_locks = patch("fcntl.flock", side_effect=OSError(37, "No locks available"))
    with no_locks, PlanCache(tmp_path / "plans.json").locked(wait_s=30):
        assert time.monotonic() - start < 5
    assert "another worker" not in caplog.text


def worker(path: Path, start: Any, results: Any) -> None:
    cache = PlanCache(path)
    start.wait()
    with cache.locked(wait_s=60):
        known = cache.find(KEY, "op=a x=1x2")
        if not known:
            time.sleep(0.3)
            cache.add(KEY, TIMES)
        results.put("read" if known else "measured")


def test_of_workers_that_start_together_one_measures(tmp_path: Path) -> None:
    context = get_context("fork")  # no second import of torch
    start, results = context.Barrier(4), context.Queue()
    workers = [context.Process(target=worker, args=(tmp_path / "plans.json", start, results)) for _ in range(4)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(60)
    assert sorted(results.get(timeout=10) for _ in workers) == ["measured", "read", "read", "read"]


def test_a_killed_holder_blocks_nobody(tmp_path: Path) -> None:
    path, context = tmp_path / "plans.json", get_context("fork")
    ready = context.Event()

    def hold() -> None:
        with PlanCache(path).locked(wait_s=60):
            ready.set()
            time.sleep(60)

    process = context.Process(target=hold)
    process.start()
    assert ready.wait(30)
    process.kill()
    process.join(30)
    start = time.monotonic()
    with PlanCache(path).locked(wait_s=30):
        assert time.monotonic() - start < 5
