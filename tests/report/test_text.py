"""The terminal: the summary, the tables of layers and kernels, and the formats of numbers."""

from __future__ import annotations

import math
from typing import Any

from redpp_serve.report import formats, tables, text
from redpp_serve.report.data import PlanRecord
from tests.support.reports import (
    SAMPLE_PLAN,
    layers,
    read,
    sample_choice,
    sample_layer,
    sample_layers,
    sample_point,
    sample_report,
)

GOLDEN_SUMMARY = """\
digits: original and pruned by redpp-serve 0.1.0

                 original    pruned               ratio
parameters         1.09 M     512 k               2.13x
MACs               2.31 G    1.10 G               2.10x
multiplications    2.31 G     988 M               2.34x
additions          2.31 G    1.10 G               2.10x
stored bytes       4.4 MB  391.2 kB              11.14x
accuracy          98.40 %   98.00 %        -0.40 points
handler p50       12.3 ms   6.54 ms  1.88x [1.85, 1.91]
handler p99       18.9 ms   10.2 ms               1.85x
latency p50       15.2 ms   8.90 ms  1.71x [1.66, 1.75]
latency p95       20.4 ms   12.6 ms               1.62x
latency p99       26.1 ms   17.0 ms               1.54x
throughput         131 /s    223 /s  1.70x [1.64, 1.76]

frontier             MACs              latency    error  flag
          1.85 G (80.0 %)  85.0 % [83.5, 87.0]   1.21 %  --target macs=0.8
          1.10 G (47.6 %)  60.2 % [58.9, 61.7]   6.11 %  --target macs=0.48 (chosen)
           578 M (25.0 %)                    –  29.00 %  --target macs=0.25

hashing (kde, relative RMS 0.02)
                                        predicted  at most  measured
  relative output error                    4.12 %  18.34 %    4.37 %
  multiplications removed by splitting    10.21 %        –   10.34 %
  The measured error is within the bound.

verification (256 held-out inputs)
  exact merging, relative error                   3.1e-13
  leaving out unread channels, relative error     2.2e-16
  exact splitting, relative error                 8.4e-15
  pruned against original, relative output error   6.11 %
  same top-1 class                                99.20 %
  same top-1 class, served answers                99.44 %

skipped: distil (no time left in the budget)

channels left alone: 8 of 11 layers
  its channels feed a residual addition:
    stem.conv, blocks.0.conv2, blocks.0.shortcut.projection.conv, blocks.1.conv2,
    blocks.1.shortcut.projection.conv, blocks.2.conv2, blocks.2.shortcut.projection.conv
  network output:
    head.classifier

verdict: Faster: the pruned version answers 1.71 times as fast at the median and agrees on 99.44 % of inputs
  (interval 1.66 to 1.75)."""


def test_package_summary_golden() -> None:
    assert text.package_summary(read(sample_report())) == GOLDEN_SUMMARY


def test_summary_of_an_empty_report_shows_dashes() -> None:
    lines = text.package_summary(read({})).splitlines()
    assert lines[0] == "model: original and pruned by redpp-serve –"
    assert [line.split() for line in lines if line.startswith("MACs")] == [["MACs", "–", "–", "–"]]
    assert "hashing" not in "".join(lines) and "accuracy" not in "".join(lines)


def test_formats() -> None:
    for show, value, expected in (
        (formats.count, 1_089_530, "1.09 M"),
        (formats.count, 2_314_000_000, "2.31 G"),
        (formats.count, 512, "512"),
        (formats.count, 999_999, "1.00 M"),
        (formats.count, 0, "0"),
        (formats.count, True, "–"),
        (formats.exact, 2048, "2048"),
        (formats.size, 4_200_000, "4.2 MB"),
        (formats.size, 999, "999 B"),
        (formats.size, 999_990, "1.0 MB"),
        (formats.percent, 0.984, "98.40 %"),
        (formats.percent, math.nan, "–"),
        (formats.error, 3.1e-13, "3.1e-13"),
        (formats.error, 0.0, "0"),
        (formats.error, 0.021, "2.10 %"),
        (formats.error, math.inf, "–"),
        (formats.milliseconds, 0.8312, "0.831 ms"),
        (formats.milliseconds, 12.31, "12.3 ms"),
        (formats.seconds, None, "–"),
        (formats.times, "2", "–"),
        (formats.shape, [2048, 1024, 1, 1], "2048x1024x1x1"),
        (formats.shape, [], "–"),
        (formats.share, 0.52, "52.0 %"),
        (formats.share, None, "–"),
    ):
        assert show(value) == expected, (show.__name__, value)


def test_ratio_is_above_one_when_pruned_is_better() -> None:
    report = {
        "original": {"macs": 300, "throughput_rps": 10.0, "bytes": 5},
        "pruned": {"macs": 100, "throughput_rps": 20.0, "bytes": 0},
    }
    ratios = {row.label: row.ratio for row in tables.summary_rows(read(report))}
    assert (ratios["MACs"], ratios["throughput"], ratios["stored bytes"]) == ("3.00x", "2.00x", "–")


def _frontier_lines(points: list[dict[str, Any]]) -> list[str]:
    report = {"frontier": {"points": points}}
    lines = text.package_summary(read(report)).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("frontier"))
    return lines[start : next((i for i in range(start, len(lines)) if not lines[i]), len(lines))]


def test_the_frontier_takes_thirteen_lines_at_most_and_keeps_the_ends_and_the_chosen() -> None:
    points = [
        sample_point(10**9 - k, 1 - k / 100, k / 50, f"--target macs={1 - k / 100:g}", (1, 1, 1), k == 37)
        for k in range(90)
    ]
    lines = _frontier_lines(points)
    assert len(lines) == 13 and lines[0].startswith("frontier (12 of 90 points)")
    assert max(map(len, lines)) <= text.WIDTH
    flags = [line.split("macs=")[1] for line in lines[1:]]
    assert flags[0] == "1" and flags[-1] == "0.11" and "0.63 (chosen)" in flags


def test_a_frontier_without_latencies_has_no_column_for_them() -> None:
    head, row = _frontier_lines([sample_point(5, 0.5, 0.1, "--target macs=0.5")])
    assert head.split() == ["frontier", "MACs", "error", "flag"]
    assert row.split() == ["5", "(50.0", "%)", "10.00", "%", "--target", "macs=0.5"]
    assert "frontier" not in text.package_summary(read({"frontier": {"points": []}}))


def test_the_frontier_shows_agreements_where_there_are_classes() -> None:
    points = [{**sample_point(5, 0.5, 0.1, "--keep-point 1"), "agreement": 0.875}, sample_point(4, 0.4, 0.2, "x")]
    head, first, second = _frontier_lines(points)
    assert head.split() == ["frontier", "MACs", "error", "agreement", "flag"]
    assert first.split()[-4:] == ["87.50", "%", "--keep-point", "1"] and second.split()[-2:] == ["–", "x"]


def test_the_families_behind_the_error_are_shown_and_whether_they_tell_it() -> None:
    report = sample_report()
    one = {"output": "y", "family": "scenes", "error": 0.2, "same": 15, "of": 16, "low": 0.7, "high": 1.0}
    every = {**one, "family": "leaves", "error": 0.05, "same": 16, "low": 0.794}
    report["verify"].update(families=[one, every, {"output": "y", "family": "real", "error": 0.06}], known=False)
    lines = [" ".join(line.split()) for line in text.package_summary(read(report)).splitlines()]
    assert "on scenes 20.00 %; same class on 93.75 % [70, 100]" in lines
    assert "on leaves 5.00 %; same class on 16 of 16, at least 79.40 %" in lines and "on real 6.00 %" in lines
    assert "error on real inputs unknown: the families differ by more than a factor of two" in lines
    report["verify"].update(families=[one, {**one, "output": "z"}], known=True)
    summary = text.package_summary(read(report))
    lines = [" ".join(line.split()) for line in summary.splitlines()]
    assert lines.index("output y 20.00 %") < lines.index("output z 20.00 %") and "unknown" not in summary


def test_measured_error_above_the_bound_is_said() -> None:
    report = sample_report()
    report["hash"]["measured_error"] = 0.5
    assert "ABOVE the predicted bound" in text.package_summary(read(report))


def test_layer_table_names_every_layer_and_fits() -> None:
    table = text.layer_table(layers(sample_layers()))
    lines = table.splitlines()
    assert lines[0].split() == [
        "layer",
        "op",
        "shape",
        "pruned",
        "to",
        "params",
        "MACs",
        "values",
        "bits",
        "RMS",
        "kept",
        "error",
    ]
    row = "blocks.0.conv1 conv2d 16x16x3x3 8x16x3x3 2.30 k 590 k 12 3.18 1.50 % 8/16 1.44 %"
    assert lines[2].split() == row.split()
    assert max(map(len, lines)) <= text.WIDTH


def test_wide_tables_shorten_names_only() -> None:
    name = "encoder." * 40 + "attention.out"
    layer = sample_layer(name, [2048, 1024, 3, 3], [1024, 1024, 3, 3], "x" * 300, values=4096)
    lines = text.layer_table(layers([layer] * 30)).splitlines()
    assert max(map(len, lines)) <= text.WIDTH
    assert "2048x1024x3x3  1024x1024x3x3" in lines[1] and "…" in lines[1]
    summary = text.package_summary(read({**sample_report(), "layers": [layer] * 30}))
    assert max(map(len, summary.splitlines())) <= text.WIDTH


def test_columns_nobody_filled_are_left_out() -> None:
    bare = [{"name": "fc", "op": "linear", "shape": [10, 64], "parameters": 640, "hash": None, "merge": None}]
    assert text.layer_table(layers(bare)).splitlines()[0].split() == ["layer", "op", "shape", "params"]
    assert text.layer_table([]) == "no layers with weights"
    assert text.layer_table(layers([{}])).splitlines()


def test_layers_that_were_only_inspected_show_channels_and_whether_they_may_go() -> None:
    found = [
        {"name": "a", "op": "conv2d", "shape": [8, 3, 3, 3], "merge": {"channels": 8, "reason": ""}},
        {"name": "b", "op": "linear", "shape": [5, 8], "merge": {"channels": 5, "reason": "is an output"}},
    ]
    head, first, second, *rest = text.layer_table(layers(found)).splitlines()
    assert head.split() == ["layer", "op", "shape", "channels", "narrowable"]
    assert (first.split()[3:], second.split()[3:]) == (["8", "yes"], ["5", "no"])
    assert rest == ["", "channels left alone: 1 of 2 layers", "  is an output:", "    b"]


def test_reasons_group_and_count() -> None:
    found = [sample_layer(f"l{i}", [8, 8, 1, 1], [8, 8, 1, 1], "rare" if i == 3 else "common") for i in range(20)]
    assert list(tables.left_alone(layers(found))) == ["common", "rare"]
    listing = text.layer_table(layers(found)).split("channels left alone: ")[1]
    assert listing.startswith("20 of 20 layers\n  common:\n    l0, l1, l2, l4") and "and 7 more" in listing


def test_terminal_control_characters_are_replaced() -> None:
    layer = sample_layer("a\x1b[2J\u202eb\nc", [8, 8, 1, 1], [8, 8, 1, 1], "why\x07")
    table = text.layer_table(layers([layer]))
    assert "a\ufffd[2J\ufffdb c" in table
    assert not any(c in table for c in "\x1b\u202e\x07")


GOLDEN_PLAN = """\
pruned
  layer          input    batch  kernel  source      dense   chosen  others
  stem           1x3x8x8      1  fused   measured  2.00 ms  1.00 ms  split 50.00 ms
  stem           8x3x8x8      8  dense   cached    4.00 ms  4.00 ms  fused 4.50 ms
  a and 1 alike  1x3x8x8      1  dense   network   20.0 us  20.0 us  fused 10.0 us
  batch 1: 3 dense, 1 fused; 3 timed, which take 2.04 ms with dense kernels, 1.04 ms as chosen
  batch 8: 2 dense; 1 timed, which take 4.00 ms with dense kernels, 4.00 ms as chosen
  1 of 6 choices dense without timing: no other kernel was worth it
  1 of 6 choices dense: the time for planning was over
  2 of 6 choices dense: the whole network was not faster with the kernel that won alone
  plan made in 1.25 s on some device, fp32"""


def test_a_plan_shows_each_time_and_why() -> None:
    assert text.plan_text({"pruned": SAMPLE_PLAN}) == GOLDEN_PLAN
    both = text.plan_text({"original": SAMPLE_PLAN, "pruned": SAMPLE_PLAN})
    assert both.startswith("original\n") and both.endswith(GOLDEN_PLAN)


def test_a_layer_that_had_no_choice_has_no_row_and_layers_that_differ_are_apart() -> None:
    plan = PlanRecord.from_json(SAMPLE_PLAN)
    assert [row.layer for row in tables.kernel_rows(plan)] == ["stem", "stem", "a and 1 alike"]
    next(choice for choice in plan.choices if choice.name == "b").source = "measured"
    assert [row.layer for row in tables.kernel_rows(plan)] == ["stem", "stem", "a", "b"]


def test_plans_of_a_former_release_are_shown_by_todays_names() -> None:
    assert text.plan_text({"redpp": SAMPLE_PLAN}) == GOLDEN_PLAN


def test_a_plan_says_how_long_engines_took_to_build() -> None:
    shown = text.plan_text({"pruned": {**SAMPLE_PLAN, "built": {"openvino fp32": 1.234, "onnxruntime fp32": 0.25}}})
    assert "\n  built in: onnxruntime fp32 0.25 s, openvino fp32 1.23 s\n" in shown


def test_a_plan_says_why_a_faster_kernel_is_not_taken() -> None:
    faster = sample_choice("a", 1, "dense", "measured", dense=2e-3, fused=1.99e-3)
    slower = sample_choice("a", 1, "dense", "measured", dense=2e-3, fused=2e-3)
    other = sample_choice("a", 1, "dense", "network", dense=2e-3, fused=1e-3)
    for choice, said in ((faster, True), (slower, False), (other, False)):
        shown = text.plan_text({"pruned": {**SAMPLE_PLAN, "choices": [choice]}})
        assert ("not surely 3 % faster" in shown) == said, choice
