"""The whole run: each stage's promise, the budget, the gates, and the same result every time."""

import hashlib
import json
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from redpp_serve.capture.export import capture
from redpp_serve.channels.coupling import Coupling, couple
from redpp_serve.errors import GateFailed, RedppError
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import InputSpec, Node, Ref
from redpp_serve.graph.layers import find_layers, mac_count
from redpp_serve.graph.weights import split_weight
from redpp_serve.options import Options
from redpp_serve.pruning import choose, pipeline, steps
from redpp_serve.pruning.effort import Effort
from redpp_serve.pruning.inputs import Sources
from redpp_serve.pruning.matching import SynthesisBudget
from redpp_serve.pruning.merging import merge_exact
from redpp_serve.pruning.verification import EXACT, VerifyData
from redpp_serve.stages import Stages
from tests.support.networks import Builder, inner_of, natural, plant, quantised, trained, widths_of

ALL = ["residual", "depthwise", "flatten", "branches", "mlp", "tokens", "bare"]


def fast(**choice):
    """Options without distillation, which has tests of its own; widths on multiples of 2.

    The inputs of these networks are too small for pictures, and some have no batch norm: their kind is unknown.
    Averages over noise hardly vary from input to input, and half of random weights tell little of what does: where
    the widths are given, the floor gives way.
    """
    loose = {"max_error": 1.5} if {"keep", "target_macs", "target_latency", "keep_point"} & choice.keys() else {}
    return Options(**{"distil": 0.0, "round_to": 2, "accept_unmeasured": True, **loose, **choice})


HALF = fast(keep=0.5)


# A busy machine must not cut the distillation short.
EFFORT = Effort(SynthesisBudget(48, 16, 10, 8, 16), 3, distillation_patience=float("inf"), pace=1e-4)


def prune(graph, options=None, **others):
    return pipeline.prune(graph, options, effort=EFFORT, **others)


def digest(graph):
    state = hashlib.sha256()
    for name, tensor in sorted(graph.tensors.items()):
        state.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def statuses(stages):
    return {s["name"]: s["status"] for s in stages.to_json()}


@pytest.mark.parametrize("kind", ALL)
def test_a_run_gives_a_narrower_network_that_still_runs(kind):
    graph, stages = trained(kind), Stages(quiet=True)
    before = digest(graph)
    result = prune(graph, HALF, stages=stages)
    assert digest(graph) == before and result.original is graph
    done = dict.fromkeys(["merge", "inputs", "reconstruct", "codebooks", "split", "verify"], "done")
    assert statuses(stages) == {**done, "hash": "skipped", "distil": "skipped"}
    kept, was = widths_of(result.pruned), widths_of(graph)
    assert kept["inner"] == 8 and all(kept[name] <= max(4, 0.7 * width) for name, width in was.items())
    opened = {layer for channel_set in couple(graph).open for layer in channel_set.producers}
    for record, layer in zip(result.layers, find_layers(result.pruned), strict=True):
        assert record.name == layer.name and record.pruned_shape == list(layer.shape)
        assert record.hash and record.split and record.merge.kept == layer.shape[0]
        assert (record.merge.reason == "") == (layer.name in opened)
    # 48 images are as many as the unknowns of the flattened reader
    families = {record.family for record in result.verify.families}
    assert result.verify.output_error < HALF.max_error and result.verify.images == 8 * len(families) >= 16
    assert result.verify.split_exact <= EXACT and result.verify.merge_exact is None
    assert result.verify.narrow_exact <= EXACT
    assert len(result.samples[0]) == 16
    written = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert set(written) == {"counting", "hash", "layers", "verify", "stages_share"}


def test_every_stage_has_its_share():
    result = prune(trained("residual"), fast(keep=0.5, distil=0.5))
    shares = {share.stage: share for share in result.shares}
    assert list(shares) == ["reconstruct", "distil", "codebooks", "tune"]
    macs = {name: share.macs for name, share in shares.items()}
    assert mac_count(result.original) > macs["reconstruct"] == macs["tune"] == mac_count(result.pruned)
    for share in shares.values():
        assert 0 < share.error < 1 and 0 <= share.agreement <= 1 and share.seconds > 0, share
        assert "accuracy" not in share.to_json()
    assert shares["tune"].error == pytest.approx(result.verify.output_error, rel=1e-6)
    assert shares["distil"].error <= shares["reconstruct"].error * (1 + 1e-6)


def test_hashing_first_has_its_share_and_its_error():
    result = prune(plant(trained("residual"), {9: 3, 4: 0}), fast(method="red++"))
    assert [share.stage for share in result.shares] == ["hash", "merge"]
    hashed, merged = result.shares
    assert 0 < hashed.error < 0.1 and merged.error == pytest.approx(hashed.error, rel=1e-3)
    assert 0 < result.hash.measured_error <= result.hash.predicted_error_bound
    assert hashed.macs == mac_count(result.original) > merged.macs == mac_count(result.pruned)


@pytest.mark.parametrize("choice", [{"method": "red++"}, {"keep": 0.5}, {"keep": 0.5, "distil": 0.5}])
def test_every_weight_of_the_result_is_in_its_codebook(choice):
    result = prune(trained("residual"), fast(hash_error=0.05, **choice))
    for record, layer in zip(result.layers, find_layers(result.pruned), strict=True):
        values = len(result.pruned.tensors[layer.weight].unique())
        assert values <= record.hash.values and record.hash.error <= 0.05
        if layer.name == "second":  # no row went behind the hashing that the record is of
            assert values == record.hash.values


def test_the_final_codebooks_are_small_where_nothing_else_is_asked_for():
    result = prune(trained("residual", 32), fast(keep=0.75))
    for record in result.layers:
        assert len(result.pruned.tensors[f"{record.name}.weight"].unique()) <= record.hash.values <= 256, record.name
    assert min(record.hash.values for record in result.layers) <= 32


@pytest.mark.parametrize(
    "options",
    [
        HALF,
        *(
            pytest.param(options, marks=pytest.mark.exhaustive)
            for options in (fast(max_error=0.3), fast(method="red++"), fast(target_macs=0.5, distil=0.5))
        ),
    ],
)
def test_one_seed_one_result(options):
    first, second = (prune(trained("residual"), options) for _ in range(2))
    assert (
        digest(first.pruned) == digest(second.pruned)
        and first.layers == second.layers
        and first.verify == second.verify
    )


@pytest.mark.exhaustive
def test_another_process_gives_the_same_tensors():
    code = "import tests.pruning.test_pipeline as t; print(t.digest(t.prune(t.trained('depthwise'), t.HALF).pruned))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == digest(prune(trained("depthwise"), HALF).pruned)


@pytest.mark.exhaustive
def test_other_seeds_give_other_networks():
    assert len({digest(prune(trained(), fast(keep=0.5, seed=s)).pruned) for s in (0, 1)}) == 2


@pytest.mark.exhaustive
def test_the_search_for_widths_respects_its_budget():
    graph, widths = trained("chain", 32), []
    for limit in (0.05, 0.15, 0.6):
        result = prune(graph, fast(max_error=limit, round_to=1))
        assert result.verify.output_error <= limit
        widths.append(sum(widths_of(result.pruned).values()))
    assert widths[0] > widths[1] > widths[2] and widths[0] < sum(widths_of(graph).values())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (fast(max_error=0.0, hash_error=0.02), "no narrower network stays within the error budget of 0"),
        (fast(keep=1.0, hash_error=0.02), "100% of each channel set: nothing is narrowed"),
        (fast(target_macs=1.0, hash_error=0.02), "nothing is narrowed"),
    ],
)
def test_without_a_narrower_network_the_quantised_one_stays(options, reason):
    graph, stages = quantised(trained("chain")), Stages(quiet=True)
    result = prune(graph, options, stages=stages)
    assert digest(result.pruned) == digest(graph) and result.verify.output_error == 0
    assert all(record.merge.kept == record.merge.channels for record in result.layers)
    assert reason in next(s for s in stages.to_json() if s["name"] == "reconstruct")["reason"]
    assert len(result.choice.points) > 1 and not any(point.chosen for point in result.choice.points)
    assert result.choice.points[0].graph is graph and result.choice.points[0].error == 0


def test_the_search_ends_with_the_time_budget_and_says_so(monkeypatch):
    now = iter(range(0, 10**7, 1000))
    monkeypatch.setattr(time, "process_time", lambda: next(now))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(choose, "reconstruct", lambda *a, **k: pytest.fail("a network was built after the deadline"))
    graph = trained("chain")
    result = prune(graph, fast())
    assert "the search for widths was cut short by --time-budget" in result.verify.inputs
    assert widths_of(result.pruned) == widths_of(graph)


GATES = [
    (fast(max_error=0.001, hash_error=0.3), "--max-error"),
    (fast(keep=0.1, max_error=1e-4, round_to=1), "--max-error"),
    (fast(target_macs=0.5, max_error=1e-4), "--max-error"),
    (fast(method="red++", hash_error=0.5, max_error=0.01), "--max-error"),
    (fast(keep=0.05, hash_error=0.9, min_agreement=1.0, max_error=10.0, round_to=1), "--min-agreement"),
    # the floor that holds without any limit
    (Options(keep=0.05, hash_error=0.9, round_to=1, distil=0.0), "at most 0.5 (--max-error)"),
    (Options(target_macs=0.2, hash_values=2, round_to=2, distil=0.0), "at most 0.5 (--max-error)"),
    (fast(keep=0.05, hash_values=2, round_to=1, max_error=None, exclude=("head",)), "at most 0.5 (--max-error)"),
]


@pytest.mark.parametrize(("options", "flag"), GATES)
def test_a_missed_number_fails_the_run(options, flag):
    stages = Stages(quiet=True)
    with pytest.raises(GateFailed) as failure:
        prune(trained("residual"), options, stages=stages)
    assert flag in failure.value.expected and statuses(stages)["verify"] == "failed"


def test_an_accuracy_limit_needs_data_and_holds():
    graph = trained("residual")
    with pytest.raises(RedppError, match="--max-accuracy-drop.*--verify-data"):
        prune(graph, Options(max_accuracy_drop=1.0))
    (x,) = natural(graph, 64, 5)
    with torch.no_grad():
        data = VerifyData((x,), Program(graph)(x)[0].argmax(1))
    assert len(data.labels.unique()) > 1
    assert prune(graph, Options(method="red++", max_accuracy_drop=20.0), data=data).accuracy[0] == 1.0
    with pytest.raises(GateFailed, match="--max-accuracy-drop"):
        prune(graph, fast(keep=0.05, hash_values=2, round_to=1, max_error=10.0, max_accuracy_drop=0.0), data=data)


@pytest.mark.parametrize("kind", ALL)
def test_exact_merging_takes_planted_copies_and_nothing_else(kind):
    graph = quantised(plant(trained(kind, 12), {11: 3, 9: 3, 4: 0}))
    result = prune(graph, Options(method="red++", round_to=1))
    assert inner_of(result.pruned).channels == 9 and result.verify.merge_exact <= EXACT
    assert result.verify.output_error < 1e-5
    assert all(t.dtype == graph.tensors[name].dtype for name, t in result.pruned.tensors.items())
    assert result.pruned.inputs == graph.inputs


@pytest.mark.parametrize("kind", ["chain", "mlp", "bare"])
def test_copies_in_two_channel_sets_in_a_row_are_merged_before_the_rest_is_fitted(kind):
    """The reader of the first set loses rows itself: its fit must aim at the outputs of the rows that stay."""
    graph = plant(plant(trained(kind, 16), {15: 3, 9: 4}), {1: 0, 3: 2}, "second")
    result = prune(graph, fast(keep=1.0, round_to=1, hash_error=0.002))
    kept = widths_of(result.pruned)
    assert kept["inner"] == 14 and kept["second"] == find_layers(graph)[-2].shape[0] - 2
    assert result.verify.output_error < 0.02
    narrower = prune(graph, fast(keep=0.8, round_to=1, hash_error=0.002))
    assert narrower.verify.output_error < 0.4
    records = {record.name: record.merge for record in narrower.layers}
    assert records["inner"].channels == 16 and records["inner"].kept == widths_of(narrower.pruned)["inner"] < 14


def test_without_redundancy_a_quantised_network_comes_back_as_it_was():
    graph = quantised(trained("chain"))
    result = prune(graph, Options(method="red++"))
    assert result.pruned.nodes == graph.nodes
    assert all(result.pruned.tensors[name] is tensor for name, tensor in graph.tensors.items())


@pytest.mark.parametrize(
    "choice", [{"keep": 0.5, "distil": 1.0}, {"target_macs": 0.8, "distil": 1.0}, {"method": "red++"}]
)
def test_excluded_layers_keep_their_bits(choice):
    """Neither fitting, distillation nor codebooks may touch them, and no constant may go into their bias."""
    graph = trained("chain")
    result = prune(graph, fast(exclude=("second*", "head"), **choice))
    for name in ("second.weight", "second.bias", "head.weight", "head.bias", "inner_bn.weight", "inner_bn.bias"):
        if "inner" not in name or choice.get("method"):  # the norm before an excluded reader may be repaired and tuned
            assert torch.equal(result.pruned.tensors[name], graph.tensors[name]), name
    records = {record.name: record for record in result.layers}
    for name in ("second", "head"):
        assert records[name].hash is None and records[name].split is None
    assert records["inner"].merge.reason == "second, which goes with it, is excluded"
    assert records["second"].merge.reason == "excluded" and records["stem"].merge.reason == ""
    assert (records["stem"].merge.kept < 4) == ("method" not in choice)


def test_all_excluded_or_no_layers_at_all_is_a_run_of_skipped_stages():
    stages = Stages(quiet=True)
    graph = trained("residual")
    result = prune(graph, Options(exclude=("*",)), stages=stages)
    assert digest(result.pruned) == digest(graph)
    assert [statuses(stages)[s] for s in ("hash", "reconstruct", "distil", "codebooks", "split")] == ["skipped"] * 5
    b = Builder(4)
    empty = b.graph(b.relu("x"))
    assert prune(empty).pruned is empty


@pytest.mark.parametrize(("options", "flag"), [({"target_macs": 0.5}, "macs"), ({"target_latency": 0.5}, "latency")])
def test_a_target_where_nothing_may_go_is_missed(options, flag):
    stages = Stages(quiet=True)
    with pytest.raises(GateFailed, match=f"--target {flag}=0.5 cannot be reached: no channel set is open"):
        prune(trained("residual"), fast(exclude=("*",), **options), stages=stages)
    assert statuses(stages)["reconstruct"] == "failed"


def test_half_precision_networks_stay_in_half_precision():
    graph = plant(trained("residual"), {9: 3}).to(torch.float16)
    result = prune(graph, Options(method="red++", round_to=1, hash_values=32))
    assert {t.dtype for t in result.pruned.tensors.values()} == {torch.float16} and inner_of(
        result.pruned
    ).channels == 15


def test_a_network_that_casts_its_input():
    """The float64 check of merging must not trip over a cast to float32 in the network."""
    graph = plant(trained("residual"), {9: 3})
    nodes = (Node("cast", "aten.to.dtype", (Ref("x"), torch.float32)), *graph.nodes)
    stem = graph.node("stem")
    nodes = tuple(Node("stem", stem.op, (Ref("cast"), *stem.args[1:])) if n.name == "stem" else n for n in nodes)
    result = prune(
        type(graph)((InputSpec("x", (3, 6, 5)),), graph.tensors, nodes, graph.outputs),
        Options(method="red++", round_to=1),
    )
    assert inner_of(result.pruned).channels == 15


class Interrupted(Stages):
    """Stages that the user interrupts when the one named begins."""

    def __init__(self, at):
        super().__init__(quiet=True)
        self.at = at

    def run(self, name):
        if name == self.at:
            raise KeyboardInterrupt
        return super().run(name)


@pytest.mark.exhaustive
def test_an_interrupted_run_goes_on_from_its_checkpoint(tmp_path):
    graph, options = trained(), fast(keep=0.5, distil=0.5)
    whole = prune(graph, options)
    for at, left in (("reconstruct", {"inputs"}), ("codebooks", {"inputs", "inputs.distil", "inputs.frontier.json"})):
        checkpoint = tmp_path / at / "inputs"
        with pytest.raises(KeyboardInterrupt):
            prune(graph, options, stages=Interrupted(at), checkpoint=checkpoint)
        assert {path.name for path in checkpoint.parent.iterdir()} == left, at
        result = prune(graph, options, checkpoint=checkpoint)
        assert digest(result.pruned) == digest(whole.pruned) and result.verify == whole.verify, at


def test_counts_are_those_of_the_result():
    result = prune(quantised(trained("chain")), HALF)
    assert result.counting.dense.multiplications == mac_count(result.original)
    assert result.counting.kernel.multiplications == sum(record.split.multiplications[1] for record in result.layers)
    assert result.hash.predicted_ratio == pytest.approx(result.hash.measured_ratio, abs=0.1)
    assert 0 < result.hash.measured_error < 1 and result.hash.method == "kmeans"  # of the fitted weights
    kept = prune(quantised(trained("chain")), fast(method="red++")).hash
    assert kept.measured_error < 1e-6 and kept.method == "kde"  # the weights were a codebook already


def test_a_merge_that_is_not_exact_stops_the_run(monkeypatch):
    def wrong(coupling, round_to):
        merged = merge_exact(coupling, round_to)
        weight = merged.graph.tensors["second.weight"]
        changed = merged.graph.with_tensors({"second.weight": weight.index_fill(1, torch.tensor([3]), 0.0)})
        return replace(merged, graph=changed)

    monkeypatch.setattr(steps, "merge_exact", wrong)
    with pytest.raises(GateFailed, match="exact merging changed"):
        prune(plant(trained("residual"), {9: 3}), Options(method="red++", round_to=1))


class Careless(Coupling):
    """A coupling that changes more than it takes out."""

    def narrow(self, kept):
        graph = super().narrow(kept)
        return graph.with_tensors({"head.bias": graph.tensors["head.bias"] + 1e-5})


def test_narrowing_that_is_more_than_taking_out_stops_the_run(monkeypatch):
    def wrong(graph, exclude):
        coupling = couple(graph, exclude)
        return Careless(*(getattr(coupling, f.name) for f in fields(coupling)))

    monkeypatch.setattr(steps, "couple", wrong)
    with pytest.raises(GateFailed, match="taking out channels that nothing reads changed"):
        prune(trained("residual"), HALF)


def test_a_split_that_is_not_exact_stops_the_run(monkeypatch):
    def wrong(weight, groups):
        split = split_weight(weight, groups)
        split.kernels[0] *= 1 + 1e-6
        return split

    monkeypatch.setattr(steps, "split_weight", wrong)
    with pytest.raises(GateFailed, match="splitting changed"):
        prune(trained("residual"), Options(method="red++"))


class Constant(nn.Module):
    """A forward that makes a float tensor without naming its type, behind two equal channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1)
        with torch.no_grad():
            self.a.weight[1], self.a.bias[1] = self.a.weight[0], self.a.bias[0]

    def forward(self, x):
        return self.b(torch.relu(self.a(x))).mean((2, 3)) @ torch.ones(5, 6)


def test_constants_of_the_default_type_join_the_check_in_float64():
    graph = capture(Constant().eval(), [InputSpec("x", (3, 8, 8))], [])
    result = prune(graph, Options(method="red++", round_to=1))
    assert result.verify.merge_exact < 1e-12 and torch.get_default_dtype() is torch.float32


class Flags(nn.Module):
    """A first output of booleans, which has no largest class."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x):
        return self.a(x) > 0


def test_outputs_without_classes_have_no_agreement_and_no_accuracy(tmp_path):
    graph = capture(Flags().eval(), [InputSpec("x", (4,))], [])
    assert prune(graph, Options(method="red++")).verify.agreement is None
    with pytest.raises(GateFailed, match="no top-1 agreement"):
        prune(graph, Options(method="red++", min_agreement=0.0))


class Roots(nn.Module):
    """Has no value anywhere."""

    def forward(self, x):
        return (-1 - x.abs()).sqrt()


def test_a_network_that_gives_no_numbers_is_refused():
    """Roots of negative numbers pass the check of the weights."""
    closed = nn.Sequential(nn.Conv2d(3, 4, 3), Roots()).eval()
    narrowable = nn.Sequential(nn.Conv2d(3, 4, 3), Roots(), nn.Conv2d(4, 2, 3)).eval()
    for net in (closed, narrowable):
        graph = capture(net, [InputSpec("x", (3, 7, 7))], [])
        for method in ("red++", "narrow"):
            with pytest.raises(RedppError, match="own output is NaN"):
                prune(graph, Options(method=method, time_budget=1))


def test_without_hashing_exact_merging_is_all_that_happens():
    graph = capture(Constant().eval(), [InputSpec("x", (3, 8, 8))], [])
    stages = Stages(quiet=True)
    result = prune(graph, Options(hash="none", method="red++", round_to=1), stages=stages)
    assert result.verify.output_error < 1e-6 and len(result.pruned.tensors["a.weight"]) == 3
    assert stages.named("hash").status == "skipped" and all(record.hash is None for record in result.layers)


def test_inputs_of_an_unknown_kind_are_not_narrowed_unless_the_user_accepts_it():
    graph, stages = trained("bare"), Stages(quiet=True)
    result = prune(graph, fast(keep=0.5, accept_unmeasured=False), stages=stages)
    assert widths_of(result.pruned) == widths_of(graph) and statuses(stages)["reconstruct"] == "skipped"
    assert "--inputs or --moments, or --accept-unmeasured" in stages.named("reconstruct").reason
    assert widths_of(prune(graph, HALF).pruned)["inner"] == 8


@pytest.mark.parametrize(("options", "flag"), [({"target_macs": 0.5}, "macs"), ({"target_latency": 0.5}, "latency")])
def test_a_target_for_inputs_of_an_unknown_kind_is_refused(options, flag):
    with pytest.raises(GateFailed, match=f"--target {flag}=0.5 cannot be reached: inputs of the network's kind"):
        prune(trained("bare"), fast(accept_unmeasured=False, **options))


def of_tokens(ranges=()):
    """Return a network that reads 7 tokens of a vocabulary of 40."""
    b = Builder(7)
    b.inputs = [InputSpec("ids", (7,), "int64", ranges)]
    b.op("embedded", "embedding.default", b.tensor("table", b.random(40, 5)), Ref("ids"))
    hidden = b.relu(b.linear("embedded", "inner", 5, 8))
    return b.graph(b.linear(b.op("pooled", "mean.dim", Ref(hidden), [1]), "head", 8, 3))


@pytest.mark.parametrize("method", ["narrow", "red++"])
def test_nothing_lossy_happens_to_a_reader_of_unknown_integers(method):
    graph, stages = of_tokens(), Stages(quiet=True)
    result = prune(graph, Options(method=method, time_budget=1, distil=0), stages=stages)
    assert digest(result.pruned) == digest(graph)
    assert {statuses(stages)[name] for name in ("hash", "reconstruct", "codebooks")} == {"skipped"}
    assert "give --input 7:int64:LOW..HIGH" in stages.named("hash" if method == "red++" else "reconstruct").reason
    found = result.verify
    assert (found.output_error, found.agreement, found.known, found.families) == (None, None, False, ())
    assert stages.named("verify").reason == "output error unknown" and not result.shares
    with pytest.raises(GateFailed, match=r"cannot be reached: the integers that ids holds"):
        prune(graph, fast(accept_unmeasured=False, target_macs=0.5))


def test_a_reader_of_tokens_is_judged_on_its_whole_vocabulary():
    result = prune(of_tokens(((0, 39),)), fast(keep=0.5, accept_unmeasured=False))
    assert widths_of(result.pruned)["inner"] == 4
    assert {record.family for record in result.verify.families} < {"uniform", "frequent", "repeated"}
    assert result.samples[0].max() > 30 and result.verify.output_error > 0.01


def test_real_inputs_tell_the_range_of_integers():
    own = torch.randint(20, 40, (40, 7), generator=torch.Generator().manual_seed(0))
    result = prune(of_tokens(), fast(keep=0.5, accept_unmeasured=False), sources=Sources(inputs=(own,)))
    assert widths_of(result.pruned)["inner"] == 4 and result.inputs.fit[0].min() == 20


def test_real_inputs_make_the_kind_known_and_judge():
    graph, stages = trained("bare"), Stages(quiet=True)
    sources = Sources(inputs=natural(graph, 40))
    result = prune(graph, fast(keep=0.5, accept_unmeasured=False), stages=stages, sources=sources)
    assert widths_of(result.pruned)["inner"] == 8 and "32 real inputs" in result.verify.inputs
    assert result.verify.images == 3 * 8 + 8


def test_widths_of_an_earlier_run_give_its_network():
    graph = trained("chain")
    first = prune(graph, fast(target_macs=0.5))
    again = prune(graph, fast(keep_point=1), sources=Sources(widths=first.choice.narrowed.widths))
    assert digest(again.pruned) == digest(first.pruned)
