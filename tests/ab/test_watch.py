"""A deployment that is watched by what Prometheus has of it: exact counts, verdicts, and a route that moves."""

import json
import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from prometheus_client import generate_latest

from redpp_serve import cli
from redpp_serve.ab.exporter import registry
from redpp_serve.ab.gateway import switch
from redpp_serve.ab.pilot import ENOUGH
from redpp_serve.ab.prometheus import Prometheus, PrometheusCounts, only_model
from redpp_serve.ab.spec import Spec, parse_ramp, parse_split
from redpp_serve.ab.splits import ANNOTATION, JOURNAL, Route, Split, SplitFiles, Unchanged
from redpp_serve.ab.watch import Watch, Watched, split_in
from redpp_serve.errors import RedppError
from redpp_serve.loopback import Ports, ask, free_ports
from redpp_serve.metrics_reader import Unreadable
from redpp_serve.options import Limits
from redpp_serve.variants import NAMES
from tests.support.composed import SET, read_compose
from tests.support.scraped import ApiServer, Pod, Scraped, running
from tests.support.tools import tool

WINDOW_S = 30.0


class Deployment:
    """Two pods and a Prometheus; each `window` serves, scrapes every 15 s and moves the clock."""

    def __init__(self, slower: float = 1.0) -> None:
        self.prometheus = Scraped()
        self.pods = [Pod("original", "1.1.1.1:8002", 1), Pod("pruned", "2.2.2.2:8002", 2, slower)]
        self.prometheus.scrape(*self.pods)

    def window(self, original: int = 40, pruned: int = 8, errors: int = 0) -> None:
        for _ in range(2):
            self.pods[0].serve(original // 2)
            self.pods[1].serve(pruned // 2 - errors)
            self.pods[1].serve(errors, "error")
            self.prometheus.time += WINDOW_S / 2
            self.prometheus.scrape(*self.pods)

    def counts(self, start: float = 1000.0) -> PrometheusCounts:
        return PrometheusCounts(self.prometheus, "m", "", start, WINDOW_S)


def always(split: str) -> object:
    return lambda start, end: split


def test_requests_and_batches_are_counted_to_the_last_one_whatever_restarts() -> None:
    made = Deployment()
    counts = made.counts()
    for step in range(10):
        made.window(errors=1)
        if step == 4:
            made.pods[0].restart()  # just after a scrape, so that nothing is lost
        if step % 3 == 0:
            counts.count(always("80:20"))
    counts.count(always("80:20"))
    traffic, windows = counts.totals().traffic, counts.new_windows()
    assert dict(traffic.requests) == {"original": 400, "pruned": 80} and traffic.errors["pruned"] == 20
    assert vars(traffic.strata["80:20"])["faults"]["pruned"] == 20 == traffic.faults["pruned"]
    assert traffic.judged["pruned"] == traffic.requests["pruned"]
    assert [window[1][0] for window in windows] == [40.0] * 9, "the window of the restart compares nothing"
    assert [window[1][2] for window in windows] == [8.0] * 9
    assert all(isinstance(count, int) for count in traffic.requests.values())
    times = counts.totals().times.histogram()
    assert times[1][-1] == 360 and times[2][-1] == 72


def test_a_server_that_comes_later_counts_from_its_second_value_on_and_one_that_goes_is_not_forgotten() -> None:
    made, late = Deployment(), Pod("pruned", "3.3.3.3:8002", 3)
    counts = made.counts()
    made.window()
    late.serve(1000)  # long before anybody scraped it
    made.pods.append(late)
    made.window()
    counts.count(always("80:20"))
    assert counts.totals().traffic.requests["pruned"] == 16
    late.serve(5)
    made.window()
    gone = made.pods.pop()
    for _ in range(12):  # longer than Prometheus looks back
        made.window()
    counts.count(always("80:20"))
    assert counts.totals().traffic.requests["pruned"] == 16 + 8 + 5 + 12 * 8
    gone.serve(3)
    made.pods.append(gone)
    made.window()
    counts.count(always("80:20"))
    assert counts.totals().traffic.requests["pruned"] == 16 + 8 + 5 + 13 * 8 + 3
    assert len(counts.new_windows()) == 16 - 2, "neither where it came nor where it came back"


def test_a_restart_that_has_passed_the_former_value_is_seen_by_the_targets_other_counters() -> None:
    made = Deployment()
    counts = made.counts()
    made.window()
    made.pods[1].restart()
    made.pods[1].serve(30, size=2)  # more batches than before, but none of one request
    made.window(pruned=0)
    counts.count(always("80:20"))
    assert counts.totals().traffic.requests["pruned"] == 8 + 60
    assert len(counts.new_windows()) == 1


def test_who_counts_again_counts_the_same() -> None:
    made, live = Deployment(), []
    counts = made.counts()
    for step in range(300):
        made.window(errors=step % 2)
        if step % 7 == 0:
            counts.count(always("80:20"))
            live += counts.new_windows()
    counts.count(always("80:20"))
    live += counts.new_windows()
    again, asked = made.counts(), made.prometheus.asked
    again.count(always("80:20"))
    assert again.new_windows() == live and again.totals().to_json() == counts.totals().to_json()
    assert made.prometheus.asked - asked == 3, "120 windows at once"


def test_a_server_that_two_jobs_scrape_is_refused_and_a_matcher_is_named() -> None:
    made = Deployment()
    made.window()
    made.prometheus.scrape(made.pods[0], job="other")
    with pytest.raises(Unreadable, match=r"1\.1\.1\.1:8002 more than once, with other values of job.*--match"):
        made.counts().count(always("80:20"))


def test_a_window_next_to_a_change_belongs_to_no_split() -> None:
    moves = [(-math.inf, "90:10"), (100.0, "80:20"), (400.0, "pruned")]
    found = [split_in(moves, 30.0, start, start + 30.0) for start in range(0, 480, 30)]
    assert found == ["90:10"] * 2 + [None] * 3 + ["80:20"] * 7 + [None] * 4


class Watching:
    """A watcher of a `Deployment`, whose clock goes by windows."""

    def __init__(self, tmp_path: Path, made: Deployment, split: Split, **spec: object) -> None:
        package = tmp_path / "package"
        package.mkdir(exist_ok=True)
        report = {"name": "m", "verify": {"agreement": 1.0, "output_error": 0.05, "images": 500}}
        (package / "report.json").write_text(json.dumps(report))
        given = {"auto": True, "ramp": (), "hold": 0.0, **spec}
        own = Spec(package, None, str(split), parse_split("80:20"), None, shadow=False, limits=Limits(), **given)
        self.made, self.said, self.folder = made, [], tmp_path / "watch"
        self.folder.mkdir(exist_ok=True)
        self.watched = Watched(own, "m", "1", window_s=WINDOW_S)
        urls = {"gateway": "", "metrics": ""}
        self.watch = Watch(self.watched, made.prometheus, split, self.folder, self.said.append, urls)

    def windows(self, count: int, **served: int) -> None:
        for _ in range(count):
            self.made.window(**served)
            self.watch.look()

    @property
    def actions(self) -> list[tuple[str, str]]:
        return [(decision.action, decision.users) for decision in self.watch.latest.decisions]

    def exported(self, name: str) -> float:
        text = generate_latest(registry(lambda: self.watch.latest)).decode()
        return float(next(line for line in text.splitlines() if line.startswith(name)).rsplit(" ", 1)[1])


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    pytest.importorskip("kubernetes")
    server = ApiServer()
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
    with running(server):
        yield server


def test_a_faster_version_climbs_the_ramp_and_is_promoted(tmp_path: Path, api: ApiServer) -> None:
    seen = Watching(tmp_path, Deployment(), Route("a/model"), ramp=parse_ramp("1,20,100"))
    seen.watch.look()
    assert api.weights == (99, 1), "the first share of the ramp"
    seen.windows(2, original=900, pruned=ENOUGH - 2)  # the first window after the change counts for no split
    assert api.weights == (99, 1)
    seen.windows(1)
    assert api.weights == (80, 20)
    seen.windows(60, original=400, pruned=100)
    assert seen.actions == [("start", "99:1"), ("ramp", "80:20"), ("promote", "pruned")]
    assert api.writes == [(99, 1), (80, 20), (0, 100)] and api.route["metadata"]["labels"] == {"kept": "yes"}
    assert [rule["backendRefs"][0].get("weight") for rule in api.route["spec"]["rules"][:2]] == [100, 0], "by header"
    assert seen.exported('redpp_ab_verdict{kind="faster"') == 1 == seen.exported('redpp_ab_traffic_ratio{arm="pruned"')
    assert 1.2 < seen.exported('redpp_ab_speedup_ratio{bound="low"') < 1.25
    assert seen.exported('redpp_ab_requests_total{arm="original"') == 2 * 900 + 40 + 60 * 400
    assert seen.exported("redpp_ab_problems") == 0


def test_a_slower_version_is_rolled_back_and_nothing_is_decided_any_more(tmp_path: Path, api: ApiServer) -> None:
    api.change(80, 20)
    seen = Watching(tmp_path, Deployment(slower=1.5), Route("a/model"))
    seen.windows(60)
    assert api.writes == [(80, 20), (100, 0)] and seen.actions == [("start", "80:20"), ("rollback", "original")]
    api.change(50, 50)
    seen.windows(3)
    assert api.weights == (50, 50) and len(seen.actions) == 2


def test_errors_of_the_pruned_version_roll_back(tmp_path: Path, api: ApiServer) -> None:
    api.change(80, 20)
    seen = Watching(tmp_path, Deployment(), Route("a/model"))
    seen.windows(12, pruned=20, errors=4)
    assert api.weights == (100, 0) and seen.watch.latest.advice.reason == "errors beyond the limit"


def test_a_route_that_somebody_else_changed_is_not_fought(tmp_path: Path, api: ApiServer) -> None:
    api.change(80, 20)
    seen = Watching(tmp_path, Deployment(), Route("a/model"))
    seen.windows(3)
    api.change(2, 1)
    seen.windows(60)
    assert api.weights == (2, 1) and seen.actions[1:] == [("stand back", "66.67:33.33")]
    assert list(seen.watch.latest.strata) == ["80:20", "66.67:33.33"]


def test_a_change_between_reading_and_writing_is_a_conflict_that_leaves_the_change(
    tmp_path: Path, api: ApiServer
) -> None:
    route = Route("a/model")
    found = route.read()
    api.change(60, 40)
    with pytest.raises(RedppError, match="was changed meanwhile"):
        route.write(found, "90:10", {})
    assert api.weights == (60, 40) and api.writes == []


def test_a_route_without_weights_divides_evenly(api: ApiServer) -> None:
    for backend in api.route["spec"]["rules"][-1]["backendRefs"]:
        del backend["weight"]
    route = Route("a/model")
    found = route.read()
    assert str(found.users) == "50:50"
    route.write(found, "80:20", {})
    assert api.weights == (80, 20)


@pytest.mark.parametrize("name", ["model-{}", "model-{}-predictor", "pruned-net-{}", "net-pruned-{}-predictor"])
def test_services_of_the_arms_end_with_their_names(api: ApiServer, name: str) -> None:
    rules = api.route["spec"]["rules"]
    for backend, arm in zip(rules[-1]["backendRefs"], NAMES, strict=True):
        backend["name"] = name.format(arm)
    canary = [{"name": "model-original", "weight": 1}, {"name": "model-pruned-canary", "weight": 9}]
    rules[0]["backendRefs"] = canary
    api.change(90, 10)
    route = Route("a/model")
    found = route.read()
    assert str(found.users) == "90:10"
    route.write(found, "80:20", {})
    assert api.weights == (80, 20) and [b["weight"] for b in api.route["spec"]["rules"][0]["backendRefs"]] == [1, 9]


def test_a_test_of_another_name_begins_anew(tmp_path: Path, api: ApiServer) -> None:
    api.change(80, 20)
    former = Watching(tmp_path, Deployment(slower=1.5), Route("a/model"))
    former.windows(60)
    assert former.actions[-1] == ("rollback", "original")
    api.change(80, 20)
    seen = Watching(tmp_path, Deployment(), Route("a/model"))
    seen.watch._watched = replace(seen.watched, test="2")
    seen.windows(2)
    assert seen.actions == [("start", "80:20")] and api.weights == (80, 20)
    assert json.loads(api.route["metadata"]["annotations"][ANNOTATION])["test"] == "2"


def test_a_watcher_that_is_started_again_goes_on_with_the_same_numbers(tmp_path: Path, api: ApiServer) -> None:
    api.change(80, 20)
    made = Deployment()
    first = Watching(tmp_path, made, Route("a/model"))
    first.windows(10)
    second = Watching(tmp_path, made, Route("a/model"))
    second.watch.look()
    keys = ("verdicts", "guardrails", "arms", "strata", "advice")
    before, after = first.watch.latest.to_json(), second.watch.latest.to_json()
    assert {key: before[key] for key in keys} == {key: after[key] for key in keys}
    assert second.actions == first.actions == [("start", "80:20")] and len(api.writes) == 1
    api.change(70, 30)  # while nobody looked
    third = Watching(tmp_path, made, Route("a/model"))
    third.windows(1)
    assert third.actions == [("start", "80:20"), ("stand back", "70:30")] and api.weights == (70, 30)
    api.route["metadata"]["annotations"][ANNOTATION] = "{"
    third.windows(1)
    assert third.said[-1].startswith(f"PROBLEM: the annotation {ANNOTATION} of HTTPRoute a/model is no journal")


def test_nothing_moves_while_prometheus_is_away_empty_or_behind(tmp_path: Path, api: ApiServer) -> None:
    api.change(80, 20)
    made = Deployment(slower=1.5)
    seen = Watching(tmp_path, made, Route("a/model"))
    seen.windows(2)
    made.prometheus.away = True
    seen.windows(60)
    assert seen.exported("redpp_ab_problems") == 1 and seen.actions == [("start", "80:20")]
    made.prometheus.away = False
    kept, made.prometheus.series = made.prometheus.series, {}
    seen.watch.look()
    made.prometheus.series = kept
    made.prometheus.time += 150.0
    seen.watch.look()
    made.prometheus.time += 15.0
    seen.watch.look()
    problems = [line for line in seen.said if line.startswith("PROBLEM")]
    assert [word in line for word, line in zip(("not answer", "it has no model", "150 s old"), problems, strict=True)]
    assert len(problems) == 3 and api.weights == (80, 20)
    seen.windows(1)
    assert seen.said[-1] != problems[-1] and api.weights == (100, 0), "what was missed is read"


def test_what_could_not_be_written_waits_for_a_prometheus_that_can_be_read(tmp_path: Path, api: ApiServer) -> None:
    api.change(80, 20)
    seen = Watching(tmp_path, Deployment(slower=1.5), Route("a/model"))
    seen.windows(2)
    api.refuse_writes = True
    seen.windows(60)
    assert seen.watch.latest.advice.kind == "rollback" and api.weights == (80, 20)
    assert seen.said[-1].startswith("PROBLEM: rollback could not be done: the API server refuses replace")
    api.refuse_writes, seen.made.prometheus.away = False, True
    seen.windows(3)
    assert api.weights == (80, 20)
    made, seen.made.prometheus.away = seen.made, False
    made.prometheus.time += 150.0  # it is behind
    seen.watch.look()
    assert api.weights == (80, 20)
    seen.windows(1)
    assert api.weights == (100, 0)


def test_a_journal_that_is_removed_begins_the_test_anew(tmp_path: Path, api: ApiServer) -> None:
    api.change(80, 20)
    seen = Watching(tmp_path, Deployment(), Route("a/model"))
    seen.windows(5)
    del api.route["metadata"]["annotations"][ANNOTATION]
    seen.windows(3)
    assert seen.actions == [("start", "80:20")] and seen.watch.latest.seconds == 2 * WINDOW_S
    assert seen.watch.latest.arms["original"].requests == 80


def test_a_pruned_version_without_any_metrics_is_rolled_back(tmp_path: Path, api: ApiServer) -> None:
    api.change(80, 20)
    seen = Watching(tmp_path, Deployment(), Route("a/model"))
    seen.windows(2)
    seen.made.pods.pop(1)
    seen.made.pods.append(Pod("original", "4.4.4.4:8002"))
    seen.windows(4)
    assert api.weights == (80, 20)
    seen.windows(1)
    assert api.weights == (100, 0) and seen.watch.latest.advice.reason == "metrics beyond the limit"
    assert seen.exported('redpp_ab_settled{arm="original"') == 1
    seen.windows(1)
    assert seen.watch.latest.problems == [], "it may well be scaled down to nothing now"
    assert seen.watch.latest.advice.reason != "metrics beyond the limit", "nobody is left to move"


def test_an_original_that_is_scaled_down_after_a_promotion_is_no_problem(tmp_path: Path, api: ApiServer) -> None:
    api.change(80, 20)
    seen = Watching(tmp_path, Deployment(), Route("a/model"))
    seen.windows(2)
    api.change(0, 100)
    seen.windows(2)
    seen.made.pods[0] = Pod("pruned", "4.4.4.4:8002")
    seen.windows(10)
    assert api.weights == (0, 100) and seen.watch.latest.problems == []
    api.change(80, 20)
    seen.windows(1)
    assert seen.watch.latest.problems == ["metrics: original has had none for a while, though the other version has"]


def test_an_original_without_any_metrics_is_a_problem(tmp_path: Path, api: ApiServer) -> None:
    api.change(80, 20)
    seen = Watching(tmp_path, Deployment(), Route("a/model"))
    seen.windows(2)
    seen.made.pods[0] = Pod("pruned", "4.4.4.4:8002")
    seen.windows(10)
    assert api.weights == (80, 20) and seen.watch.latest.problems == [
        "metrics: original has had none for a while, though the other version has"
    ]


@pytest.mark.parametrize(
    "status,words", [(403, "refuses get of HTTPRoute a/model: 403"), (None, "the API server does not answer")]
)
def test_an_api_server_that_refuses_or_is_away_is_told(
    tmp_path: Path, api: ApiServer, status: int | None, words: str
) -> None:
    seen = Watching(tmp_path, Deployment(), Route("a/model"), ramp=parse_ramp("10,100"))
    api.refusal = status
    if status is None:
        api.shutdown()
        api.server_close()
    seen.windows(2)
    assert [words in line for line in seen.said] == [True] and seen.watch.latest is None


@pytest.mark.parametrize("name", ["model", "a/b/c", "/model", "a/"])
def test_a_routes_name_has_a_namespace(name: str) -> None:
    with pytest.raises(RedppError, match="write for example redpp-serve/model"):
        Route(name)


def test_all_users_on_one_arm_without_a_ramp_compare_nothing(tmp_path: Path, api: ApiServer) -> None:
    seen = Watching(tmp_path, Deployment(slower=1.5), Route("a/model"))
    seen.windows(60)
    assert api.writes == [] and seen.watch.latest.problems == [
        "all users get original, so nothing is compared until the split gives each arm some"
    ]
    api.change(80, 20)
    seen.windows(3)
    assert seen.actions[0] == ("start", "80:20")


def test_without_auto_the_verdict_is_told_and_nothing_is_written(tmp_path: Path, api: ApiServer) -> None:
    api.change(80, 20)
    seen = Watching(tmp_path, Deployment(), Route("a/model"), auto=False)
    seen.windows(60, original=400, pruned=100)
    assert api.writes == [] and any("Promote: pruned is 1.2" in line for line in seen.said)
    plain = Watching(tmp_path, Deployment(), Unchanged(parse_split("80:20")), auto=False)
    plain.windows(60, original=400, pruned=100)
    assert plain.watch.latest.advice.kind == "promote"


def test_the_files_of_compose_roll_back_and_keep_the_journal(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    seen = Watching(tmp_path, Deployment(slower=1.5), SplitFiles(folder, parse_split("80:20")))
    seen.windows(60)
    assert not list(folder.iterdir())
    (folder / "split").touch()
    seen.windows(3)
    again = Watching(tmp_path, seen.made, SplitFiles(folder, parse_split("80:20")))
    again.windows(60)
    assert again.actions == [("start", "80:20"), ("rollback", "original")]
    assert [path.name for path in folder.iterdir()] == [JOURNAL]


def test_what_somebody_moved_in_the_files_of_compose_is_not_undone(tmp_path: Path) -> None:
    split = SplitFiles(tmp_path, parse_split("80:20"))
    (tmp_path / "split").touch()
    found = split.read()
    switch(tmp_path, "pruned")
    with pytest.raises(RedppError, match="was changed meanwhile"):
        split.write(found, "original", {})
    assert str(split.read().users) == "pruned" and not (tmp_path / JOURNAL).exists()


def test_a_model_is_found_where_there_is_one_alone() -> None:
    made = Deployment()
    assert only_model(made.prometheus, "") == "m"
    made.pods[0].labels["model"] = "n"
    made.prometheus.scrape(*made.pods)
    with pytest.raises(RedppError, match="several models: m, n"):
        only_model(made.prometheus, "")


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--auto"], "--auto without a split to change"),
        (["--auto", "--split-folder", "x", "--ramp", "1,100"], "--ramp with --split-folder"),
        (["--route", "a/b", "--split-folder", "x"], "one of --route and --split-folder"),
        (["--prometheus", "localhost:9090"], "--prometheus localhost:9090"),
        (["--model", "m", "--window", "0.1"], "not a number from 1 to 3600"),
        (["--model", "m", "--since", "yesterday"], "'yesterday' is not a date and a time"),
        (["--prometheus", "http://127.0.0.1:9"], "does not answer"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(["ab", "watch", *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2 and words in capsys.readouterr().err


def test_a_watcher_needs_neither_torch_nor_a_server_library() -> None:
    program = "import sys, redpp_serve.ab.watch, redpp_serve.ab.splits; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "psutil", "tritonclient", "kubernetes"} & set(loaded)


class Page(ThreadingHTTPServer):
    """A pod's metrics page."""

    def __init__(self, pod: Pod) -> None:
        self.pod, self.lock = pod, threading.Lock()
        super().__init__(("127.0.0.1", 0), _Page)


class _Page(BaseHTTPRequestHandler):
    server: Page

    def do_GET(self) -> None:
        with self.server.lock:
            data = self.server.pod.text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def real_prometheus(folder: Path, targets: list[str]) -> Iterator[str]:
    """A Prometheus that scrapes ten times a second; its URL."""
    scraping = {"job_name": "redpp", "static_configs": [{"targets": targets}]}
    config = {"global": {"scrape_interval": "100ms", "scrape_timeout": "100ms"}, "scrape_configs": [scraping]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_ports(Ports).metrics}"
    flags = {"config.file": folder / "prometheus.yml", "storage.tsdb.path": folder / "data", "log.level": "error"}
    command = [tool("prometheus"), *(f"--{key}={value}" for key, value in flags.items())]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(timeout=15)


@pytest.mark.server
def test_the_watcher_of_compose_on_a_real_prometheus(tmp_path: Path) -> None:
    """Its own words, but for the places that they name."""
    words, port = read_compose()["services"]["watch"]["command"], free_ports(Ports).metrics
    state, package = tmp_path / "state", tmp_path / "package"
    state.mkdir()
    package.mkdir()
    (package / "report.json").write_text(json.dumps({"name": "m", "verify": {"agreement": 1.0, "output_error": 0.05}}))
    (state / "split").touch()
    pages = [Page(Pod("original", "", 1)), Page(Pod("pruned", "", 2))]
    with ExitStack() as stack:
        for page in pages:
            page.pod.serve(40)
            stack.enter_context(running(page))
        url = stack.enter_context(real_prometheus(tmp_path, [f"127.0.0.1:{page.server_address[1]}" for page in pages]))
        places = {
            "--prometheus=http://prometheus:9090": f"--prometheus={url}",
            f"--model={SET['MODEL_NAME']}": "--model=m",
            "--package=/package": f"--package={package}",
            "--split-folder=/state/redpp": f"--split-folder={state}",
            "--address=0.0.0.0": "--address=127.0.0.1",
            "--port=9400": f"--port={port}",
        }
        assert set(places) < set(words)
        command = [sys.executable, "-m", "redpp_serve.cli", *(places.get(word, word) for word in words)]

        with (tmp_path / "said").open("wb") as said:
            watcher = subprocess.Popen(command, stdout=said, stderr=said)
        stack.callback(watcher.kill)
        deadline = time.monotonic() + 90  # the next look, where Prometheus had scraped nothing at the first
        while not (state / JOURNAL).exists():
            assert time.monotonic() < deadline, (tmp_path / "said").read_text()
            time.sleep(0.1)
        text = ask(f"http://127.0.0.1:{port}/metrics")[1].decode()
        assert 'redpp_ab_traffic_ratio{arm="pruned",model="m"} 0.1' in text
        watcher.terminate()
        assert watcher.wait(timeout=10) == 128 + 15
    assert [(row["action"], row["users"]) for row in json.loads((state / JOURNAL).read_text())["decisions"]] == [
        ("start", "90:10")
    ]


@pytest.mark.server
def test_a_real_prometheus_a_pod_that_restarts_and_the_command(
    tmp_path: Path, api: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redpp_serve.ab.prometheus._BEHIND_S", 1.0)
    pages = [Page(Pod("original", "", 1)), Page(Pod("pruned", "", 2))]
    targets = [f"127.0.0.1:{page.server_address[1]}" for page in pages]
    with ExitStack() as stack:
        for page in pages:
            stack.enter_context(running(page))
        url = stack.enter_context(real_prometheus(tmp_path, targets))
        made = Deployment()
        made.prometheus = Prometheus(url)  # type: ignore[assignment]
        seen = Watching(tmp_path, made, Route("a/model"), ramp=parse_ramp("20,100"))
        seen.watch._watched = replace(seen.watched, window_s=0.25)

        def serve(original: int = 40, pruned: int = 20) -> None:
            for page, count in zip(pages, (original, pruned), strict=True):
                with page.lock:
                    page.pod.serve(count)
            time.sleep(0.05)

        def until(done: Callable[[], bool], what: str) -> None:
            deadline = time.monotonic() + 60
            while not done():
                assert time.monotonic() < deadline, (what, seen.said)
                serve()
                seen.watch.look()

        until(lambda: api.weights == (80, 20), "the start")
        before = {page: page.pod.counted["ok"] for page in pages}  # Prometheus has begun to scrape only now
        command = [sys.executable, "-m", "redpp_serve.cli", "ab", "watch", "--prometheus", url, "--split", "80:20"]
        port = free_ports(Ports).metrics
        with (tmp_path / "said").open("wb") as said:
            apart = subprocess.Popen([*command, "--window", "1", "--port", str(port)], stdout=said, stderr=said)
        stack.callback(apart.kill)
        until(lambda: len(seen.watch.latest.strata) > 0, "counts of the split")
        for page in pages:
            with page.lock:
                page.pod.restart()
        until(lambda: api.weights == (0, 100), "the promotion")
        assert seen.actions == [("start", "80:20"), ("promote", "pruned")]
        time.sleep(0.5)
        seen.watch.look()
        arms = seen.watch.latest.arms
        for page, count in zip(pages, (40, 20), strict=True):  # what lies between the restart and a scrape is missing
            served = page.pod.counted["ok"] - before[page]
            assert abs(arms[page.pod.labels["variant"]].requests - served) <= 10 * count < 0.2 * served
        exported = ask(f"http://127.0.0.1:{port}/metrics")[1].decode()
        assert re.search(r'redpp_ab_requests_total{arm="pruned",model="m"} [1-9]', exported), exported
        apart.terminate()
        assert apart.wait(timeout=10) == 128 + 15
        assert b"watches m on its servers" in (tmp_path / "said").read_bytes()
        pages[0].shutdown()
        pages[1].shutdown()
        time.sleep(1.5)
        seen.watch.look()
        assert "is behind" in seen.watch.latest.problems[0] or "has no" in seen.watch.latest.problems[0]
    seen.watch.look()
    assert "does not answer" in seen.watch.latest.problems[0] and api.weights == (0, 100)
