"""Second moments of what layers read: equal to those computed directly, bounded, and only ever of many inputs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import unfold

from redpp_serve.errors import RedppError
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref
from redpp_serve.graph.layers import find_layers
from redpp_serve.graph.tensor_file import TensorFile, safetensors_parts
from redpp_serve.runtime import moments as module
from redpp_serve.runtime.moments import POSITIONS, Adder, Layout, Moments, Sums, fingerprint
from redpp_serve.runtime.moments_file import FORMAT, LEAST, add_to_file, check_file, load_moments

KEY = "redpp_moments"
SHAPE = (2, 9, 7)


def network(seed: int = 0) -> Graph:
    """A strided and dilated convolution, a depthwise and a grouped one, a 1 x 1 convolution, and two Linear layers."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {
        "a.weight": weight(6, 2, 3, 2),
        "a.bias": weight(6),
        "b.weight": weight(6, 1, 3, 3),
        "g.weight": weight(6, 3, 3, 3),
        "c.weight": weight(5, 6, 1, 1),
        "d.weight": weight(4, 5),
        "e.weight": weight(3, 4),
    }
    nodes = (
        Node("a", "aten.conv2d.default", (Ref("x"), Ref("a.weight"), Ref("a.bias"), [2, 1], [1, 2], [2, 1])),
        Node("r", "aten.relu.default", (Ref("a"),)),
        Node("b", "aten.conv2d.default", (Ref("r"), Ref("b.weight"), None, [1, 1], [1, 1], [1, 1], 6)),
        Node("g", "aten.conv2d.default", (Ref("b"), Ref("g.weight"), None, [1, 1], [1, 1], [1, 1], 2)),
        Node("c", "aten.conv2d.default", (Ref("g"), Ref("c.weight"))),
        Node("f", "aten.flatten.using_ints", (Ref("c"), 2)),
        Node("t", "aten.transpose.int", (Ref("f"), 1, 2)),
        Node("d", "aten.linear.default", (Ref("t"), Ref("d.weight"))),
        Node("m", "aten.mean.dim", (Ref("d"), [1])),
        Node("e", "aten.linear.default", (Ref("m"), Ref("e.weight"))),
    )
    return Graph((InputSpec("x", SHAPE),), tensors, nodes, ("e", "d"))


def inputs(count: int = LEAST, seed: int = 1) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed)) + 0.5


def added(graph: Graph, x: Tensor) -> Sums:
    adder = Adder(graph)
    for row in x.split(1):
        adder.add([row])
    return adder.sums


def observed(graph: Graph, x: Tensor) -> Moments:
    return added(graph, x).moments(fingerprint(graph))


def rows(value: Tensor, axis: int) -> Tensor:
    return value.movedim(axis, -1).flatten(0, -2).double()


def close(found: Tensor, wanted: Tensor) -> None:
    """Hold sums against each other; what float32 rounds in the largest is all that small ones may be off."""
    assert found.shape == wanted.shape and found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4 + 1e-6 * float(wanted.abs().max()))


def test_sums_equal_those_computed_directly_from_all_inputs_at_once() -> None:
    graph, x = network(), inputs()
    found = observed(graph, x)
    assert found.images == LEAST and found.skipped == 0
    names = [node.name for node in graph.nodes]
    values = dict(zip(names, Program(graph, names)(x), strict=True)) | {"x": x}
    read = {layer.node.args[0].name: layer.axis for layer in find_layers(graph)}
    assert set(read) == {"x", "r", "b", "g", "t", "m"} <= set(found.values)
    for name, axis in read.items():
        wanted, one = rows(values[name], axis), found.values[name]
        assert one.count == len(wanted)
        close(one.total, wanted.sum(0))
        close(one.gram, wanted.T @ wanted)
        close(one.covariance(), wanted.T.cov(correction=0))
        close(one.variance(), wanted.var(0, correction=0))
    for layer in find_layers(graph):
        wanted, one = rows(values[layer.node.name], layer.axis), found.values[layer.node.name]
        assert one.count == len(wanted)
        close(one.squares, wanted.square().sum(0))
    for name in graph.outputs:
        wanted = values[name].flatten(1).double()
        assert found.outputs[name].count == LEAST
        close(found.outputs[name].gram, wanted.T @ wanted)
        close(found.outputs[name].mean(), wanted.mean(0))


@pytest.mark.parametrize("small", [False, True])
def test_patches_equal_what_the_convolutions_read(monkeypatch: pytest.MonkeyPatch, small: bool) -> None:
    """Dense and grouped layers have all pairs of numbers, depthwise ones those of a channel; wide ones have sums."""
    if small:
        monkeypatch.setattr(module, "_MOST_PATCH", 20)
        monkeypatch.setattr(module, "_MOST_TAPS", 300)
    graph, x = network(), inputs()
    found = observed(graph, x)
    assert set(found.patches) == {"a", "b", "g"}
    forms = {"a": (12, 12), "b": (9, 9), "g": (9, 9)} if small else {"a": (12, 12), "b": (6, 9, 9), "g": (54, 54)}
    for layer in find_layers(graph):
        if layer.node.name not in forms:
            continue
        (value,) = Program(graph, [layer.node.args[0].name])(x)
        columns = unfold(
            value.double(), layer.shape[2:], layer.window.dilation, layer.window.padding, layer.window.stride
        )
        patches = columns.transpose(1, 2).flatten(0, 1)
        one = found.patches[layer.node.name]
        channels, taps = one.total.shape
        assert one.count == len(patches) and one.gram.shape == forms[layer.node.name]
        assert one.whole == (one.gram.shape == 2 * (channels * taps,))
        close(one.total.flatten(), patches.sum(0))
        whole, within = patches.T.cov(correction=0), range(channels)
        by_channel = whole.view(channels, taps, channels, taps)[within, :, within]
        close(one.covariance(), whole if one.whole else by_channel if one.gram.dim() == 3 else by_channel.sum(0))
        summed = by_channel.sum(0)
        close(one.tap_correlation(), summed / summed.diagonal().mean())


def test_a_large_map_is_sampled_evenly_and_elsewhere_each_time() -> None:
    size = 64
    weight = {"w.weight": torch.ones(1, 1, 1, 1)}
    nodes = (Node("w", "aten.conv2d.default", (Ref("x"), Ref("w.weight"))),)
    graph = Graph((InputSpec("x", (1, size, size)),), weight, nodes, ("w",))
    place = torch.arange(size * size).view(1, 1, size, size).float()
    adder, columns = Adder(graph), set()
    for _ in range(8):
        before = adder.sums.tensors.get("value/x/total", torch.zeros(1)).clone()
        adder.add([place])
        columns.add(float(adder.sums.tensors["value/x/total"] - before))
    found = adder.sums.moments("").values["x"]
    assert found.count == 8 * POSITIONS and len(columns) > 4
    assert float(found.mean()) == pytest.approx(float(place.mean()), rel=0.01)


def test_an_input_with_a_value_that_is_not_finite_is_left_out_and_counted() -> None:
    graph, x = network(), inputs(4)
    bad = x.clone()
    bad[1, 0, 3, 3], bad[2] = float("nan"), 3e38  # the second overflows inside
    found, wanted = observed(graph, bad), observed(graph, x[[0, 3]])
    assert (found.images, found.skipped) == (2, 2)
    close(found.values["m"].gram, wanted.values["m"].gram)


def test_memory_is_bounded_widest_values_first() -> None:
    graph = network()
    whole = Layout.of(graph)
    assert whole.values["r"].pairs and "g" in whole.patches
    tight = Layout.of(graph, most_bytes=8 * (2 * 2 + 4 * 4 + 5 * 5 + 6 * 6))
    assert {name for name, value in tight.values.items() if value.pairs} == {"x", "m", "t", "r"}
    assert not tight.patches
    adder = Adder(graph, tight)
    adder.add([inputs(1)])
    found = adder.sums.moments("")
    assert found.values["g"].gram is None and found.values["g"].covariance() is None
    assert found.values["g"].squares.shape == (6,)


def test_an_output_that_is_too_wide_has_squares_alone_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_OUTPUT", 3)
    graph, x = network(), inputs(3)
    found = observed(graph, x).outputs
    assert found["e"].gram is not None and found["d"].gram is None
    (d,) = Program(graph, ["d"])(x)
    close(found["d"].squares, d.flatten(1).double().square().sum(0))
    monkeypatch.setattr(module, "_LARGEST_OUTPUT", 3)
    assert set(observed(graph, x).outputs) == {"e"}


def test_a_file_gives_back_the_moments_and_is_private(tmp_path: Path) -> None:
    graph, path = network(), tmp_path / "moments.safetensors"
    sums = added(graph, inputs())
    assert add_to_file(path, sums, graph)
    found, wanted = load_moments(path, graph), sums.moments(fingerprint(graph))
    assert path.stat().st_mode & 0o777 == 0o600
    assert (found.images, found.fingerprint) == (LEAST, fingerprint(graph))
    for name, value in wanted.values.items():
        assert torch.equal(found.values[name].squares, value.squares) and found.values[name].count == value.count
    for name, patches in wanted.patches.items():
        assert torch.equal(found.patches[name].gram, patches.gram)


def test_two_workers_add_to_one_file(tmp_path: Path) -> None:
    graph, path, x = network(), tmp_path / "moments.safetensors", inputs(2 * LEAST + 5)
    for part in x.split(LEAST + 3):
        assert add_to_file(path, added(graph, part), graph)
    found, wanted = load_moments(path, graph), observed(graph, x)
    assert found.images == len(x)
    for name, value in wanted.values.items():
        assert found.values[name].count == value.count
        close(found.values[name].squares, value.squares)
    close(found.outputs["e"].gram, wanted.outputs["e"].gram)


def test_fewer_inputs_than_hide_each_other_never_leave_the_process(tmp_path: Path) -> None:
    graph, path = network(), tmp_path / "moments.safetensors"
    few = added(graph, inputs(LEAST - 1))
    with pytest.raises(RedppError, match=f"{LEAST - 1} inputs.*at least {LEAST}"):
        add_to_file(path, few, graph)
    assert not path.exists()
    assert add_to_file(path, added(graph, inputs()), graph)
    before = path.read_bytes()
    with pytest.raises(RedppError, match=f"at least {LEAST}"):  # the difference would tell as much
        add_to_file(path, few, graph)
    assert path.read_bytes() == before


def test_another_network_is_told_apart(tmp_path: Path) -> None:
    graph, path = network(), tmp_path / "moments.safetensors"
    add_to_file(path, added(graph, inputs()), graph)
    weight = graph.tensors["e.weight"].clone()
    weight[0, 0] = weight[0, 0].nextafter(torch.tensor(9.0))
    renamed = replace(graph, nodes=(*graph.nodes[:-1], replace(graph.nodes[-1], name="z")), outputs=("z", "d"))
    for other in (network(1), graph.with_tensors({"e.weight": weight}), renamed):
        for refused in (load_moments, check_file):
            with pytest.raises(RedppError, match="moments of another network"):
                refused(path, other)
        with pytest.raises(RedppError, match="moments of another network"):
            add_to_file(path, added(other, inputs()), other)
    check_file(path, replace(graph))


def rewritten(path: Path, change: dict[str, object], spoil: str = "", value: float = 0.0) -> None:
    """Write a file of moments anew with another header, or another first number in a tensor."""
    file = TensorFile(path.read_bytes())
    header = {**json.loads(file.metadata[KEY]), **change}
    tensors = {name: file[name] for name in file.entries}
    if spoil:
        tensors[spoil].view(-1)[0] = value
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    path.write_bytes(b"".join(safetensors_parts(shapes, torch.float64, tensors.values(), {KEY: json.dumps(header)})))


@pytest.mark.parametrize(
    ("change", "spoil", "value", "found"),
    [
        ({"format": FORMAT + 1}, "", 0.0, f"has format {FORMAT + 1}"),
        ({"images": 3}, "", 0.0, "3 inputs"),
        ({"images": -1}, "", 0.0, "counts of other than"),
        ({"images": True}, "", 0.0, "counts of other than"),
        ({"counts": {}}, "", 0.0, "counts that do not belong"),
        ({"counts": None}, "", 0.0, "cannot be read"),
        ({}, "value/x/gram", float("nan"), "no sum of finite numbers"),
        ({}, "value/x/gram", -1.0, "negative square"),
        ({}, "value/e/squares", -1.0, "no sum of finite numbers"),
    ],
)
def test_a_header_or_number_that_cannot_be_is_refused(
    tmp_path: Path, change: dict[str, object], spoil: str, value: float, found: str
) -> None:
    graph, path = network(), tmp_path / "moments.safetensors"
    add_to_file(path, added(graph, inputs()), graph)
    rewritten(path, {})
    assert load_moments(path, graph).images == LEAST  # it is the change that is refused
    rewritten(path, change, spoil, value)
    with pytest.raises(RedppError, match=found):
        load_moments(path, graph)


def test_damaged_foreign_and_missing_files_are_refused(tmp_path: Path) -> None:
    graph, path = network(), tmp_path / "moments.safetensors"
    with pytest.raises(RedppError, match="does not exist"):
        load_moments(path, graph)
    add_to_file(path, added(graph, inputs()), graph)
    whole = path.read_bytes()
    shapes = {"value/x/total": (2,)}
    foreign = b"".join(safetensors_parts(shapes, torch.float64, [torch.zeros(2).double()], {}))
    for content in (b"", b"moments", whole[:-8], whole[: len(whole) // 2], whole + b"\0", foreign):
        path.write_bytes(content)
        with pytest.raises(RedppError, match="cannot be read as moments"):
            load_moments(path, graph)
        with pytest.raises(RedppError, match="cannot be read as moments"):
            add_to_file(path, added(graph, inputs()), graph)
        assert path.read_bytes() == content
    with pytest.raises(RedppError, match="cannot be read as moments"):
        load_moments(tmp_path, graph)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    graph = network()
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "moments", tmp_path / "missing" / "moments", Path("/proc/moments")):
        with pytest.raises(RedppError, match="cannot be written"):
            check_file(path, graph)
    check_file(tmp_path / "moments", graph)
    assert {path.name for path in tmp_path.iterdir()} == {"file", ".moments.lock"}
