"""The plan's tables: every candidate's time, why a kernel runs, and nothing that a layer's name could break."""

from html.parser import HTMLParser
from typing import Any

import pytest

from redpp_serve.report.html import render
from redpp_serve.report.plans import plan_rows, plan_section, plan_summary, plan_text


def choice(name: str, batch: int, kernel: str, source: str, **times: float) -> dict[str, Any]:
    return {
        "layer": f"{name}_1",
        "name": name,
        "batch": batch,
        "kernel": kernel,
        "source": source,
        "times": times,
        "shape": f"{batch}x3x8x8",
    }


PLAN = {
    "device": "some device",
    "precision": "fp32",
    "batches": [1, 8],
    "seconds": 1.25,
    "digest": "0",
    "choices": [
        choice("stem", 1, "fused", "measured", dense=2e-3, fused=1e-3, split=5e-2),
        choice("stem", 8, "dense", "cached", dense=4e-3, fused=4.5e-3),
        choice("a", 1, "dense", "network", dense=20e-6, fused=10e-6),
        choice("b", 1, "dense", "network", dense=20e-6, fused=10e-6),
        choice("head", 1, "dense", "rule"),
        choice("head", 8, "dense", "budget"),
    ],
}
GOLDEN = """\
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


def test_the_terminal_shows_each_time_and_why() -> None:
    assert plan_text({"pruned": PLAN}) == GOLDEN
    both = plan_text({"original": PLAN, "pruned": PLAN})
    assert both.startswith("original\n") and both.endswith(GOLDEN)


def test_a_layer_that_had_no_choice_has_no_row_and_layers_that_differ_are_apart() -> None:
    assert [row.layer for row in plan_rows(PLAN)] == ["stem", "stem", "a and 1 alike"]
    other = {**PLAN, "choices": [{**c, "source": "measured"} if c["name"] == "b" else c for c in PLAN["choices"]]}
    assert [row.layer for row in plan_rows(other)] == ["stem", "stem", "a", "b"]


class Texts(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_has_a_section_only_where_a_plan_was_made() -> None:
    assert plan_section({}) == "" and "Kernels" not in Texts(render({})).texts
    found = Texts(render({"plan": {"original": PLAN, "pruned": PLAN}})).texts
    assert "Kernels" in found and "The original network" in found and "split 50.00 ms" in found
    assert any("3 dense, 1 fused" in text for text in found)


def test_names_cannot_break_out() -> None:
    hostile = "<script>x</script>\x1b[2J\u202e"
    plan = {
        **PLAN,
        "choices": [choice(hostile, 1, hostile, hostile, **{"dense": 1.0, hostile: 1.0, "y" + hostile: 2.0})],
        "batches": [hostile],
        "device": hostile,
        "precision": hostile,
    }
    section = Texts(plan_section({"plan": {"pruned": plan}}))
    assert "script" not in section.tags and any("<script>" in text for text in section.texts)
    assert not any(c in plan_text({"pruned": plan}) for c in "\x1b\u202e")


@pytest.mark.parametrize(
    "damage",
    [
        {"choices": None},
        {"choices": 5},
        {"choices": ["x", None]},
        {"batches": 5},
        {"seconds": "x"},
        {"choices": [{}]},
        {"choices": [choice("a", 1, "dense", "measured", dense=float("nan"))]},
        {"choices": [{**choice("a", 1, "dense", "measured"), "times": {"dense": [1], "b": None}}]},
    ],
)
def test_a_damaged_plan_shows_what_is_left(damage: dict[str, Any]) -> None:
    plan = {**PLAN, **damage}
    assert plan_text({"pruned": plan}) and "Kernels" in plan_section({"plan": {"pruned": plan}}) and plan_summary(plan)
    assert plan_text({"pruned": 3}) == "" and plan_section({"plan": 3}) == ""
