"""The whole comparison against servers with known delays, its JSON, and its table to the letter."""

import json

import pytest

from redpp_serve.comparison import Comparison, Payload, compare_endpoints
from redpp_serve.comparison.compare import Agreement, Arm
from redpp_serve.errors import RedppError
from redpp_serve.options import ComparisonOptions
from redpp_serve.report.data import Report
from redpp_serve.report.tables import size_rows
from redpp_serve.statistics.intervals import Estimate
from redpp_serve.statistics.verdicts import Verdict
from tests.comparison.test_load import Server, Start, start  # noqa: F401  (start is a fixture)

PAYLOADS = [Payload(str(i).encode(), "text/plain", label=0) for i in range(1, 5)]


def run(a: Server, b: Server, seconds: float = 0.6, payloads: list[Payload] = PAYLOADS) -> Comparison:
    options = ComparisonOptions(concurrency=1, duration=seconds)
    return compare_endpoints(a.endpoint("original"), b.endpoint("pruned"), payloads, options, progress=False)


def test_faster_and_almost_the_same(start: Start) -> None:  # noqa: F811
    def altered(i: int) -> list[float]:
        return [-1.0, 1.0] if i == 4 else [i + 0.5, -i]

    result = run(start(0.012), start(0.003, answer=altered), seconds=2.5)
    assert result.verdict.kind == "faster"
    assert "pruned is " in result.verdict.text and "end to end" in result.verdict.text
    assert result.handler_verdict is not None and result.handler_verdict.kind == "faster"
    for name in ("handler_p50", "end_to_end_p50", "throughput"):
        estimate = result.speedup[name]
        assert estimate is not None and 1.3 < estimate.value < 6 and estimate.low <= estimate.value <= estimate.high
    assert result.speedup["handler_p50"] == pytest.approx((4.0, 4.0, 4.0))
    assert result.agreement.top1 == 0.75 and result.agreement.inputs == 4
    assert result.agreement.max_abs_difference == 5.0
    expected = (sum(0.5 / (i * 2**0.5) for i in (1, 2, 3)) + 50**0.5 / 32**0.5) / 4
    assert result.agreement.mean_relative_difference == pytest.approx(expected)
    assert (result.original.accuracy, result.pruned.accuracy) == (1.0, 0.75)
    assert result.original.errors == result.pruned.errors == 0


def test_latency_is_told_near_each_of_several_sizes(start: Start) -> None:  # noqa: F811
    payloads = [Payload(b"1", "text/plain", sizes="L=2"), *(Payload(b"2", "text/plain", sizes="L=64"),) * 2]
    result = run(start(0.006), start(0.002), payloads=payloads)
    found = {each.sizes: each for each in result.by_sizes}
    assert found.keys() == {"L=2", "L=64"} and sum(each.pairs for each in found.values()) == result.pairs
    assert found["L=64"].pairs >= found["L=2"].pairs > 1
    for each in found.values():
        assert each.original > each.pruned >= 2.0 and each.ratio.low <= each.ratio.value <= each.ratio.high
    assert [e["sizes"] for e in result.to_json()["by_sizes"]] == [e.sizes for e in result.by_sizes]
    lines = result.to_text().splitlines()
    at = next(k for k, line in enumerate(lines) if line.startswith("latency p50"))
    assert all(line.startswith("  near L=") for line in lines[at + 1 : at + 3])
    assert len(size_rows(Report.from_json(result.to_json()))) == 2


def test_json_holds_every_key(start: Start) -> None:  # noqa: F811
    data = run(start(0.004), start(0.004)).to_json()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    expected = {"original", "pruned", "agreement", "speedup", "verdict", "verdict_kind", "verdict_handler"}
    assert set(data) == expected | {
        "verdict_handler_kind",
        "pairs",
        "batch",
        "concurrency",
        "seconds",
        "margin",
        "open_loop",
        "gains",
    }
    assert data["pairs"] > 5 and data["margin"] == 0.02 and data["concurrency"] == 1 and data["seconds"] == 0.6
    assert data["verdict_kind"] in {"faster", "slower", "equivalent", "undecided"} and "original" in data["verdict"]
    arm = data["pruned"]
    assert set(arm["latency_ms"]) == {"p50", "p95", "p99"} == set(arm["latency_ms_interval"])
    assert set(arm["handler_ms"]) == {"p50", "p99"} and arm["handler_ms"]["p50"] == pytest.approx(4.0)
    low, high = arm["latency_ms_interval"]["p50"]
    assert 4.0 <= low <= arm["latency_ms"]["p50"] <= high
    assert set(data["speedup"]["throughput"]) == {"ratio", "low", "high"} and arm["accuracy"] == 1.0


@pytest.mark.exhaustive
def test_a_rate_is_kept_whatever_the_answers_take(start: Start) -> None:  # noqa: F811
    """The slow arm is asked as often as the fast one, and its queue shows in its latency."""
    slow, fast = start(0.02, one_at_a_time=True), start(0.002, one_at_a_time=True)
    options = ComparisonOptions(concurrency=1, duration=2.4, rate=45.0)
    result = compare_endpoints(slow.endpoint("original"), fast.endpoint("pruned"), PAYLOADS, options, progress=False)
    measured = result.open_loop
    assert measured is not None and measured.failed == (0, 0)
    assert all(9 <= sent <= 40 for sent in measured.sent)  # 22 expected
    original, pruned = measured.latency_ms
    assert original is not None and pruned is not None
    assert original["p50"].value > 20 > pruned["p50"].value
    data = result.to_json()["open_loop"]
    assert data["rate_rps"] == 45 and data["pruned"]["latency_ms"]["p50"] == pruned["p50"].value
    assert "at 45/s p99 (ms)" in result.to_text() and "at 45/s failed" in result.to_text()


def test_failed_requests_are_counted_and_quoted(start: Start) -> None:  # noqa: F811
    result = run(start(0.003), start(0.003, reject=("3",)))
    assert result.original.errors == 0 and 0 < result.pruned.errors < result.pruned.requests / 2
    assert result.agreement.inputs == 3
    assert 'pruned failed first with: {"message": "bad input"}' in result.to_text()


def test_an_arm_that_answers_nothing_is_refused_with_its_text(start: Start) -> None:  # noqa: F811
    good, bad = start(0.0), start(0.0, reject=tuple("1234"))
    with pytest.raises(RedppError, match=r'pruned \(http.*answered none of 4 requests: status 400: .*"bad input"'):
        run(good, bad)
    assert bad.requests == 4, "found before any load"


def test_outputs_of_another_shape_are_refused(start: Start) -> None:  # noqa: F811
    with pytest.raises(RedppError, match=r"shapes \(2,\) and \(3,\)"):
        run(start(0.001), start(0.001, answer=lambda i: [1.0, 2.0, 3.0]), seconds=0.2)


def test_no_class_no_agreement_on_classes(start: Start) -> None:  # noqa: F811
    result = run(start(0.001, answer=lambda i: [i]), start(0.001, answer=lambda i: [i]), seconds=0.5)
    assert result.agreement == Agreement(None, 0.0, 0.0, 4) and result.original.accuracy is None
    assert "accuracy" not in result.to_json()["original"]


def test_wrong_options_are_refused(start: Start) -> None:  # noqa: F811
    for options in ({"margin": 0.0}, {"concurrency": 0}, {"duration": 0.0}, {"rate": 0.0}):
        with pytest.raises(RedppError, match=f"--{next(iter(options))}"):
            ComparisonOptions(**options)
    server = start(0.0)
    with pytest.raises(RedppError, match="no inputs"):
        compare_endpoints(server.endpoint("a"), server.endpoint("b"), [])


def arm(label: str, scale: float, **options: object) -> Arm:
    def estimates(**values: float) -> dict[str, Estimate]:
        return {name: Estimate(scale * x, 0.9 * scale * x, 1.1 * scale * x) for name, x in values.items()}

    handler = estimates(p50=4.0, p99=9.5)
    numbers = {"throughput_rps": 400 / scale, "requests": 900, "errors": 0, "first_error": "", "accuracy": None}
    return Arm(label, estimates(p50=6.0, p95=8.0, p99=112.25), handler, **{**numbers, **options})


def test_table_to_the_letter() -> None:
    result = Comparison(
        original=arm("original", 1.0, accuracy=0.9812),
        pruned=arm("pruned", 0.5, accuracy=0.98, errors=2, first_error="503 busy"),
        agreement=Agreement(0.995, 0.25, 0.0123, 360),
        speedup={
            "handler_p50": Estimate(2.0, 1.95, 2.05),
            "end_to_end_p50": Estimate(1.62, 1.58, 1.66),
            "throughput": None,
        },
        verdict=Verdict("faster", "pruned is 1.62 times as fast as original end to end (...)", 1.58, 1.66),
        handler_verdict=Verdict("faster", "pruned is 2.00 times as fast as original in the handler (...)", 1.95, 2.05),
        pairs=800,
        concurrency=4,
        seconds=20.0,
        margin=0.02,
    )
    expected = """\
800 pairs, 4 requests at a time, 20 s

                  original    pruned  ratio (95 % interval)
handler p50 (ms)      4.00      2.00  2.00 (1.95 to 2.05)
handler p99 (ms)      9.50      4.75
latency p50 (ms)      6.00      3.00  1.62 (1.58 to 1.66)
latency p95 (ms)      8.00      4.00
latency p99 (ms)    112.25     56.12
throughput (1/s)     400.0     800.0
failed requests   0 of 900  2 of 900
accuracy            98.12%    98.00%

pruned failed first with: 503 busy
Outputs: same class on 99.50% of 360 inputs, mean relative difference 0.0123, largest difference 0.25
pruned is 2.00 times as fast as original in the handler (...).
pruned is 1.62 times as fast as original end to end (...)."""
    assert result.to_text() == expected


def test_replies_without_handler_times_leave_the_rows_out() -> None:
    arms = [Arm(label, {"p50": Estimate(1.0, 1.0, 1.0)}, None, 10.0, 5, 0, "", None) for label in ("a", "b")]
    speedup = {"handler_p50": None, "end_to_end_p50": Estimate(1.0, 1.0, 1.0), "throughput": None}
    undecided = Verdict("undecided", "no decision", 0.5, 2.0)
    result = Comparison(*arms, Agreement(None, 0.0, 0.0, 1), speedup, undecided, None, 5, 1, 1.0, 0.02)
    assert "handler" not in result.to_text() and result.to_json()["verdict_handler"] is None
    assert result.to_json()["original"]["handler_ms"] is None
