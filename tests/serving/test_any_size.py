"""A real server answers requests of many sizes at once, each as its network does, and refuses sizes nobody declared."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from redpp_serve.capture import Captured
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph
from redpp_serve.graph.sizes import drawn, resized
from redpp_serve.options import Options, ServerOptions, Serving
from redpp_serve.packaging.mar import read_artifact
from redpp_serve.packaging.package import package
from redpp_serve.packaging.samples import as_array, read_samples, sized
from redpp_serve.serving.serve import open_server
from redpp_serve.serving.server import LocalServer
from redpp_serve.variants import NAMES, ORIGINAL
from tests.capture.test_any_size import Segments, Sound, Text, captured
from tests.support.rollout import predict, read

pytestmark = pytest.mark.server

NETWORKS: dict[str, tuple[type[nn.Module], list[str], list[str]]] = {
    "segmentation": (Segments, ["3xHxW"], ["H=32..96/32", "W=32..96/32"]),
    "text": (Text, ["L:int64", "L:int64"], ["L=2..64"]),
    "audio": (Sound, ["T"], ["T=401..4000"]),
}
CASES = [("torchserve", "text"), ("triton", "segmentation")]
MORE = [("torchserve", "segmentation"), ("torchserve", "audio"), ("triton", "text"), ("triton", "audio")]
REQUESTS = 16


@pytest.fixture(
    scope="module", params=[*CASES, *(pytest.param(case, marks=pytest.mark.exhaustive) for case in MORE)], ids=" ".join
)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    kind, name = request.param
    graph = captured(NETWORKS[name][0](), *NETWORKS[name][1:])
    options = Options(hash="none", keep=0.75, distil=0, time_budget=1, max_error=10, round_to=1, accept_unmeasured=True)
    out = tmp_path_factory.mktemp("sized") / name
    source = {"file": f"{name}.pt", "kind": "a module", "sha256": "0" * 64, "arch": None}
    package(Captured(graph, source), out, name=name, options=options, serving=Serving(4, 5, 1))
    with open_server(out, ServerOptions(kind), name=name) as running:
        yield running


def chosen(server: LocalServer, graph: Graph, count: int) -> list[tuple[Tensor, ...]]:
    """Inputs without a batch, of many sizes."""
    samples, generator = read_samples(server.folder, graph.inputs), torch.Generator().manual_seed(0)
    return [
        tuple(sized(x[:1], resized(spec, sizes), generator)[0] for spec, x in zip(graph.inputs, samples, strict=True))
        for sizes in drawn(graph.inputs, count, seed=1)
    ]


def test_requests_of_many_sizes_at_once(server: LocalServer) -> None:
    for version, variant in zip(server.versions, NAMES, strict=True):
        graph = read_artifact(server.folder / f"{variant}.mar").graph
        requests = chosen(server, graph, REQUESTS)
        with ThreadPoolExecutor(8) as pool:
            answers = list(
                pool.map(
                    lambda inputs, version=version: predict(server, version, list(map(as_array, inputs))), requests
                )
            )
        for inputs, (response, body) in zip(requests, answers, strict=True):
            found, values = read(server.kind, response, body)
            with torch.no_grad():
                (expected,) = Program(graph)(*(x[None] for x in inputs))
            assert found == variant
            share = 1e-4 if variant == ORIGINAL.name else 0.03  # the pruned version may be served in 16 bits
            limit = share * float(expected.max() - expected.min())
            torch.testing.assert_close(torch.tensor(values).flatten(), expected.flatten(), rtol=0, atol=limit)


def test_sizes_that_were_not_declared_are_refused(server: LocalServer) -> None:
    graph = read_artifact(server.folder / "original.mar").graph
    beyond = {symbol: 3 * size.high for spec in graph.inputs for _, size in spec.varying for symbol in (size.symbol,)}
    inputs = tuple(torch.ones(resized(spec, beyond).shape, dtype=getattr(torch, spec.dtype)) for spec in graph.inputs)
    response, body = predict(server, server.versions[0], list(map(as_array, inputs)))
    assert response.status == 400, body
