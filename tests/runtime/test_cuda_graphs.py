"""Buckets, padding and chunks, with a stand-in for the recorded graph: it repeats the run into the same tensors."""

import pytest
import torch
from torch import Tensor

from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref
from redpp_serve.runtime.cuda_graphs import BucketRunner, CudaRecorder
from redpp_serve.runtime.serving_graph import batch_buckets, bucket_for, chunks
from tests.support.recording import StandIn

CPU = torch.device("cpu")


def network() -> Graph:
    """Twice the sum of an image and a vector's first number; and the image as it came in."""
    nodes = (
        Node("number", "aten.slice.Tensor", (Ref("vector"), 1, 0, 1)),
        Node("plane", "aten.reshape.default", (Ref("number"), [-1, 1, 1, 1])),
        Node("sum", "aten.add.Tensor", (Ref("image"), Ref("plane"))),
        Node("y", "aten.mul.Tensor", (Ref("sum"), 2.0)),
    )
    return Graph((InputSpec("image", (3, 2, 2)), InputSpec("vector", (4,))), {}, nodes, ("y", "image"))


def runner(graph: Graph, batches: tuple[int, ...] = (1, 2, 4)) -> tuple[BucketRunner, StandIn]:
    program, recorder = Program(graph), StandIn()
    return BucketRunner(dict.fromkeys(batches, program), graph.inputs, CPU, recorder), recorder


def inputs(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, 2, 2, generator=g), torch.randn(rows, 4, generator=g)


def test_buckets_are_powers_of_two_and_the_largest() -> None:
    expected = {1: [1], 2: [1, 2], 6: [1, 2, 4, 6], 8: [1, 2, 4, 8]}
    assert {largest: batch_buckets(largest) for largest in expected} == expected


def test_the_smallest_bucket_that_holds_the_rows() -> None:
    expected = {0: 1, 1: 1, 2: 2, 3: 4, 5: 6, 6: 6, 7: 6}
    assert {rows: bucket_for([1, 2, 4, 6], rows) for rows in expected} == expected


def test_chunks_hold_each_row_once() -> None:
    for rows, sizes in ((0, [0]), (1, [1]), (4, [4]), (5, [4, 1]), (12, [4, 4, 4])):
        found = list(chunks(rows, 4))
        assert [part.stop - part.start for part in found] == sizes
        assert [k for part in found for k in range(rows)[part]] == list(range(rows))


@pytest.mark.parametrize(
    ("rows", "buckets"), [(0, [1]), (1, [1]), (2, [2]), (3, [4]), (4, [4]), (5, [4, 1]), (11, [4, 4, 4])]
)
def test_rows_go_through_buckets(rows: int, buckets: list[int]) -> None:
    run, recorder = runner(network())
    x = inputs(rows)
    want = Program(network())(*x)
    for got, expected in zip(run(*x), want, strict=True):
        assert torch.equal(got, expected)
    assert recorder.replayed == buckets


def test_the_largest_bucket_is_recorded_first() -> None:
    _, recorder = runner(network(), (4, 1, 2))
    assert recorder.recorded == [4, 2, 1]


def test_padding_holds_nothing_of_earlier_requests() -> None:
    run, recorder = runner(network())
    run(*inputs(4))
    run(*inputs(3, seed=1))
    assert not recorder.seen[-1][3:].any() and recorder.seen[-1][:3].all()


def test_outputs_outlive_the_next_request_and_inputs_are_left_alone() -> None:
    run, _ = runner(network())
    first, second = inputs(3), inputs(3, seed=1)
    kept = first[0].clone()
    y, image = run(*first)
    before = y.clone()
    run(*second)
    assert torch.equal(y, before) and torch.equal(image, kept) and torch.equal(first[0], kept)


def test_inputs_of_any_layout_and_dtype() -> None:
    run, _ = runner(network())
    image, vector = inputs(4)
    want = run(image, vector)
    wide = torch.zeros(4, 6, 4, 4)
    wide[:, ::2, ::2, ::2] = image
    for same in (image.to(memory_format=torch.channels_last), wide[:, ::2, ::2, ::2], image.double()):
        for got, expected in zip(run(same, vector.t().contiguous().t()), want, strict=True):
            assert torch.equal(got, expected) and got.dtype == torch.float32


def test_outputs_that_are_no_rows_cannot_be_padded() -> None:
    whole = Graph((InputSpec("x", (3,)),), {}, (Node("y", "aten.sum.default", (Ref("x"),)),), ("y",))
    doubled = Graph((InputSpec("x", (3,)),), {}, (Node("y", "aten.cat.default", ([Ref("x"), Ref("x")],)),), ("y",))
    for graph in (whole, doubled):
        with pytest.raises(RuntimeError, match="for a batch of 4"):
            runner(graph)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    device, graph = torch.device("cuda"), network()
    program = Program(graph).to(device)
    with torch.inference_mode():
        run = BucketRunner(dict.fromkeys((1, 2, 4), program), graph.inputs, device, CudaRecorder(device))
        for rows in (1, 3, 4, 11):
            x = inputs(rows)
            for got, want in zip(run(*x), Program(graph)(*x), strict=True):
                torch.testing.assert_close(got, want)
                assert got.device == CPU
