"""Splitting gives the weight back bit by bit, and its counts are those of counting by hand."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redpp_serve.graph import weights as splitting
from redpp_serve.graph.graph import Node
from redpp_serve.graph.layers import CONV, LINEAR, Call, Layer, Window
from redpp_serve.graph.weights import split_weight
from redpp_serve.pruning import verification as verify
from redpp_serve.pruning.accounting import Counts, count_dense, count_kernels, count_scalars, expected_kernels
from tests.support.networks import many, seeds

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def layer_of(shape, groups=1, positions=7):
    op = CONV if len(shape) == 4 else LINEAR
    call = Call(Node("layer", op, ()), Window((1, 1), (0, 0), (1, 1), groups), positions)
    return Layer("layer", (call,), "layer.weight", None, tuple(shape))


@st.composite
def weights(draw):
    """Quantised weights of convolutions (grouped, depthwise, 1 x 1) and Linear: repeated, negated and zero kernels."""
    groups = draw(st.sampled_from([1, 1, 2, 5]))
    n_out, n_in = groups * draw(st.integers(1, 9)), draw(st.integers(1, 6))
    if draw(st.booleans()):
        n_in = 1
    kernel = draw(st.sampled_from([(1, 1), (2, 1), (3, 3), (1, 5)]))
    shape = (n_out, n_in) if groups == 1 and kernel == (1, 1) and draw(st.booleans()) else (n_out, n_in, *kernel)
    g = torch.Generator().manual_seed(draw(seeds))
    w = torch.randint(-1, 2, shape, generator=g).to(draw(st.sampled_from(DTYPES))) * 0.1
    w = w * (torch.rand(shape[:2], generator=g) > 0.2).view(*shape[:2], *[1] * (len(shape) - 2))
    return w, groups


def kernels_by_hand(w, groups):
    """{input channel: {kernel up to its sign: bit pattern}}, zero kernels left out."""
    w = w if w.dim() == 4 else w[..., None, None]
    per_group, found = len(w) // groups, {}
    for o, i in itertools.product(range(len(w)), range(w.shape[1])):
        values = tuple(w[o, i].flatten().double().tolist())
        if any(values):
            found.setdefault(o // per_group * w.shape[1] + i, set()).add(max(values, tuple(-v + 0.0 for v in values)))
    return found


@given(weights())
@many
def test_rebuild_gives_the_weight_bit_by_bit(case):
    w, groups = case
    rebuilt = split_weight(w, groups).rebuild().view(w.shape)
    assert rebuilt.dtype == w.dtype and torch.equal(rebuilt, w)


@given(weights())
@many
def test_each_channel_stores_its_distinct_kernels_once(case):
    w, groups = case
    split, expected = split_weight(w, groups), kernels_by_hand(w, groups)
    assert torch.bincount(split.channel, minlength=1).tolist()[: max(expected, default=0) + 1] == [
        len(expected.get(c, ())) for c in range(max(expected, default=0) + 1)
    ]
    kernels = w.reshape(*w.shape[:2], -1)
    assert torch.equal(split.index < 0, (kernels == 0).all(2))
    assert torch.equal(split.sign == 0, split.index < 0)
    per_group = len(w) // groups
    for o, i in itertools.product(range(len(w)), range(w.shape[1])):
        if split.index[o, i] >= 0:
            assert split.channel[split.index[o, i]] == o // per_group * w.shape[1] + i


def index_bits(units: torch.Tensor, groups: int) -> int:
    """Every output of a column spends log2 of how many different units, sign and zero included, the column holds."""
    per_group = len(units) // groups
    columns = (units[g * per_group : (g + 1) * per_group, c] for g in range(groups) for c in range(units.shape[1]))
    return per_group * sum(
        math.ceil(math.log2(len({tuple((unit + 0.0).tolist()) for unit in column}))) for column in columns
    )


@given(weights(), st.integers(1, 50))
@many
def test_counts_of_kernels_against_the_formulas(case, positions):
    """k^2 HW sum(u) and HW [(k^2 - 1) sum(u) + sum over outputs of (used - 1)];
    k^2 sum(u) values, log2 bits of signed choices a pair."""
    w, groups = case
    layer, found = layer_of(w.shape, groups, positions), kernels_by_hand(w, groups)
    taps, u = math.prod(w.shape[2:]), [len(k) for k in found.values()]
    used = (w.reshape(*w.shape[:2], -1) != 0).any(2).sum(1).tolist()
    additions = positions * ((taps - 1) * sum(u) + sum(max(n - 1, 0) for n in used))
    bits = index_bits(w.reshape(len(w), w.shape[1], -1), groups)
    expected = Counts(positions * taps * sum(u), additions, 2 * taps * sum(u) + math.ceil(bits / 8))
    assert count_kernels(layer, split_weight(w, groups), element_size=2) == expected


@given(weights(), st.integers(1, 50))
@many
def test_counts_of_scalars_by_hand(case, positions):
    w, groups = case
    layer = layer_of(w.shape, groups, positions)
    per_group, columns = len(w) // groups, w.reshape(len(w), -1).abs().double()
    distinct = [
        len(set(columns[g * per_group : (g + 1) * per_group, c].tolist()) - {0.0})
        for g in range(groups)
        for c in range(columns.shape[1])
    ]
    additions = positions * sum(max(int(n) - 1, 0) for n in (columns != 0).sum(1))
    bits = index_bits(w.reshape(len(w), -1, 1), groups)
    assert count_scalars(layer, w) == Counts(
        positions * sum(distinct), additions, 4 * sum(distinct) + math.ceil(bits / 8)
    )


@given(weights(), st.integers(1, 50))
@many
def test_dense_counts(case, positions):
    w, groups = case
    n_out, inputs = len(w), math.prod(w.shape[1:])
    expected = Counts(positions * n_out * inputs, positions * n_out * (inputs - 1), 2 * n_out * inputs)
    assert count_dense(layer_of(w.shape, groups, positions), 2) == expected


def test_the_two_readings_differ_as_the_method_says():
    """Two 1 x 2 kernels (1, 2) and (1, 3): two kernels, but three magnitudes in the columns."""
    w, layer = torch.tensor([[[[1.0, 2.0]]], [[[1.0, 3.0]]]]), layer_of((2, 1, 1, 2), positions=1)
    assert count_kernels(layer, split_weight(w)).multiplications == 4
    assert count_scalars(layer, w).multiplications == 3


def test_a_kernel_shares_the_storage_of_its_negative():
    k = torch.randn(1, 1, 3, 3)
    split = split_weight(torch.cat([k, -k, k, 0 * k]))
    assert len(split.kernels) == 1 and split.index.view(-1).tolist() == [0, 0, 0, -1]
    assert (split.sign.view(-1) * split.sign[0]).tolist() == [1, -1, 1, 0]


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (4, 3), (1, 1, 1, 1)])
def test_a_weight_of_zeros_stores_nothing(shape):
    split = split_weight(torch.zeros(shape))
    assert len(split.kernels) == 0 and torch.equal(split.rebuild().view(shape), torch.zeros(shape))
    assert (
        count_kernels(layer_of(shape), split) == count_scalars(layer_of(shape), torch.zeros(shape)) == Counts(0, 0, 0)
    )


def test_blocks_of_inputs_make_no_difference(monkeypatch):
    w = torch.randint(-1, 2, (6, 11, 2, 2)).float()
    whole = split_weight(w)
    monkeypatch.setattr(splitting, "SPLIT_CHUNK", 50)
    blocks = split_weight(w)
    assert all(torch.equal(getattr(whole, f), getattr(blocks, f)) for f in ("kernels", "channel", "index", "sign"))


def test_colliding_fingerprints_are_noticed_and_made_again(monkeypatch):
    fingerprint, attempts = splitting._fingerprint, []

    def collide(values, attempt):
        attempts.append(attempt)
        return torch.zeros(values.shape[:2], dtype=torch.int64) if attempt == 0 else fingerprint(values, attempt)

    monkeypatch.setattr(splitting, "_fingerprint", collide)
    w = torch.randn(5, 3, 3, 3)
    assert torch.equal(split_weight(w).rebuild(), w) and attempts == [0, 1]


def draw(values, p, shape, seed=0):
    index = torch.multinomial(
        torch.tensor(p, dtype=torch.float64), math.prod(shape), True, generator=torch.Generator().manual_seed(seed)
    )
    return torch.tensor(values)[index].view(shape)


ALPHABETS = {
    "ternary": ([-1.0, 0.0, 1.0], [0.3, 0.4, 0.3]),
    "sparse": ([-1.0, 0.0, 1.0], [0.05, 0.9, 0.05]),
    "one sign": ([-0.5, 0.1, 0.7], [0.2, 0.5, 0.3]),
    "binary": ([-1.0, 1.0], [0.5, 0.5]),
    "many": ([float(v) for v in range(-20, 21)], [1 / 41] * 41),
    "bell": ([float(v) for v in range(-8, 9)], [math.exp(-(v**2) / 8) for v in range(-8, 9)]),
}


@pytest.mark.parametrize("alphabet", ALPHABETS)
@pytest.mark.parametrize(("kernel", "tolerance"), [((1, 1), 0.02), ((2, 2), 0.05), ((3, 3), 0.05)])
@pytest.mark.parametrize("n_out", [16, 200])
def test_expected_kernels_against_simulation(alphabet, kernel, tolerance, n_out):
    values, p = ALPHABETS[alphabet]
    p = [q / sum(p) for q in p]
    inputs = 800 if kernel == (1, 1) else 100
    found = len(split_weight(draw(values, p, (n_out, inputs, *kernel))).kernels)
    expected = expected_kernels(
        layer_of((n_out, inputs, *kernel)),
        torch.tensor(p, dtype=torch.float64),
        torch.tensor(values, dtype=torch.float64),
    )
    assert expected == pytest.approx(found, rel=tolerance)


def test_expected_kernels_of_a_depthwise_layer_is_one_each():
    p, values = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert expected_kernels(layer_of((40, 1, 3, 3), groups=40), p, values) == pytest.approx(40, rel=1e-3)


def wrong_sign(split):
    return replace(split, sign=torch.cat([-split.sign[:1], split.sign[1:]]))


def wrong_index(split):
    return replace(split, index=torch.cat([split.index[1:], split.index[:1]]))


def last_bit(split):
    kernels = split.kernels.clone()
    kernels[0, 0, 0] = torch.nextafter(kernels[0, 0, 0], torch.tensor(9.0))
    return replace(split, kernels=kernels)


def wrong_channel(split):
    return replace(split, channel=split.channel.flip(0))


@pytest.mark.parametrize("mutate", [wrong_sign, wrong_index, last_bit, wrong_channel])
def test_the_check_of_a_split_notices_any_change(mutate):
    w = torch.randn(4, 3, 3, 3)
    split, layer = split_weight(w), layer_of(w.shape)
    assert verify.split_error(layer, w, split, 0) < verify.EXACT
    try:
        assert verify.split_error(layer, w, mutate(split), 0) > 1e-3
    except ValueError as refusal:  # the operator itself refuses kernels that are not in order of their channels
        assert mutate is wrong_channel, refusal
