"""Serve the original and the pruned network in Triton's Python back end: the same model class for both.

Triton checks names, dtypes and most shapes, and hands over several requests at once, each of one or more rows: they run
as one batch. Tensors pass by DLPack both ways; numpy arrays would lose their data where numpy 2 is installed.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redpp_serve.errors import RedppError
from redpp_serve.graph.ranges import outside
from redpp_serve.graph.sizes import disagreement, fits, in_words
from redpp_serve.handlers.batching import (
    NETWORK_FAILED,
    NOT_FINITE,
    by_shape,
    describe,
    load_model,
    open_observer,
    run_network,
    set_threads,
    together_or_alone,
)
from redpp_serve.handlers.metrics import Metrics, ModelLabels
from redpp_serve.handlers.tracing import (
    ID_HEADER,
    INFERENCE,
    POSTPROCESS,
    PREPROCESS,
    Spans,
    Traced,
    named,
    open_spans,
    phase,
    request_id,
)
from redpp_serve.handlers.triton_metrics import TritonBinding
from redpp_serve.handlers.wire import HANDLER_PARAMETER, PROBE_ID, write_seconds
from redpp_serve.runtime.model import ServingModel
from redpp_serve.runtime.observer import Observer

log = logging.getLogger(__name__)

CONFIG = "config.pbtxt"


@dataclass
class _Request:
    """One request on its way: its rows of the batch, then its outputs or the reason it failed.

    Attributes:
        asked: the request as Triton hands it over.
    """

    asked: Any
    trace: Traced | None = None
    inputs: tuple[Tensor, ...] = ()
    rows: slice = field(default_factory=lambda: slice(0))
    outputs: tuple[Tensor, ...] = ()
    outcome: str = "ok"
    reason: str = ""

    @property
    def id(self) -> str:
        """The request's id: that of its header, such as the gateway's, or else of the protocol's body."""
        return request_id(self.headers.get(ID_HEADER)) or request_id(self.asked.request_id())

    @property
    def headers(self) -> dict[str, str]:
        """Those headers, by names in lower case, that the server was told to pass on as parameters."""
        try:
            given = json.loads(self.asked.parameters() or "{}").items()
        except (ValueError, AttributeError):  # a Triton that knows no parameters, or none that can be read
            return {}
        return {key.lower(): value for key, value in given if isinstance(value, str)}

    def fail(self, outcome: str, reason: str) -> None:
        self.outcome, self.reason = outcome, reason


class RedppModel:
    """Loads one artifact and answers batches; Triton makes one object in each instance's process.

    Attributes:
        artifact: the file; set by the generated ``model.py``, which lies beside it.
        model: the loaded network.
        metrics: None where the server collects none. Triton's warm-up requests are not counted.
        observer: None where nobody asks for moments. Triton's warm-up requests are not observed.
    """

    artifact: Path
    model: ServingModel
    metrics: Metrics | None
    observer: Observer | None
    spans: Spans | None

    def initialize(self, args: dict[str, str]) -> None:
        """Load the artifact, choose its kernels, run every batch bucket, and open the metrics.

        Raises:
            RedppError: a damaged artifact, or a configuration without batches or with wrong ``threads``,
                ``precision`` or ``engine``.
        """
        import triton_python_backend_utils as backend  # noqa: PLC0415  filled by Triton after this module is imported

        start = time.perf_counter()
        self._backend = backend
        config = json.loads(args["model_config"])
        if config.get("max_batch_size", 0) < 1:
            raise RedppError(
                f"max_batch_size is {config.get('max_batch_size')} in {CONFIG}",
                "a positive integer",
                f"correct {CONFIG}",
            )
        given = {name: value.get("string_value") for name, value in config.get("parameters", {}).items()}
        threads = given.get("threads")
        set_threads(int(threads) if threads and threads.isdecimal() else threads, CONFIG)
        device = _device(args)
        self.model = load_model(
            self.artifact,
            device,
            batch=config["max_batch_size"],
            precision=given.get("precision"),
            engine=given.get("engine"),
            where=CONFIG,
        )
        self._uncounted = sum(max(1, sample.get("count", 0)) for sample in config.get("model_warmup", []))
        description = self.model.description
        labels = ModelLabels(args["model_name"], str(description["version"]), str(description["variant"]))
        self._answers_parameters = _takes_parameters(backend)
        self._binding, self.metrics = TritonBinding(backend), None
        try:
            self.metrics = Metrics(labels, self._binding, device)
            describe(self.metrics, self.model)
        except Exception as error:  # what Triton raises where its metrics are turned off
            log.warning("metrics are off: %s", error)
        self.observer = open_observer(self.artifact, self.model)
        self.spans = open_spans(labels)
        if self.metrics:
            self.metrics.ready(time.perf_counter() - start)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return one response for each request, with the network's outputs or that request's own error."""
        start, start_ns = time.perf_counter(), time.time_ns()
        items = [_Request(request) for request in requests]
        for item in items:
            if self.spans and not self._uncounted:
                item.trace = self.spans.begin(item.id, item.headers)
            with phase(PREPROCESS, [item]):
                self._read(item)
        self._answer([item for item in items if item.outcome == "ok"])
        seconds = time.perf_counter() - start
        responses = []
        for item in items:
            with phase(POSTPROCESS, [item]):
                responses.append(self._response(item, seconds))
        if self.spans and not self._uncounted:
            self.spans.note(start_ns, [(item.outcome, item.trace) for item in items])
        if self._uncounted:  # Triton's warm-up comes before any client's request
            self._uncounted -= 1
        elif self.metrics and (counted := [item for item in items if item.id != PROBE_ID]):
            self.metrics.batch(len(counted), time.perf_counter() - start)
            for item in counted:
                self.metrics.request(item.outcome)
        return responses

    def finalize(self) -> None:
        """Hand over the metrics and the observed moments that are still on their way."""
        if self.observer:
            self.observer.close()
        if self.spans:
            self.spans.close()
        self.metrics = None
        self._binding.close()

    def _read(self, item: _Request) -> None:
        try:
            tensors = {tensor.name(): tensor for tensor in item.asked.inputs()}
            item.inputs = tuple(
                torch.utils.dlpack.from_dlpack(tensors[spec.name].to_dlpack()) for spec in self.model.inputs
            )
            # Triton counts rows in 32 bits: a request for 2**40 arrives as one row that lacks its batch dimension.
            plain = all(fits(spec, x.shape[1:]) for x, spec in zip(item.inputs, self.model.inputs, strict=True))
            if not plain or len({len(x) for x in item.inputs}) != 1 or not len(item.inputs[0]):
                shapes = ", ".join(str(tuple(x.shape)) for x in item.inputs)
                sizes = "; ".join(in_words(spec) for spec in self.model.inputs if spec.varying)
                expected = "one or more rows, as many in each" + (f", of {sizes}" if sizes else "")
                item.fail("bad_request", f"Found inputs of shapes {shapes}, expected {expected}")
            elif wrong := disagreement(self.model.inputs, [x.shape[1:] for x in item.inputs]):
                item.fail("bad_request", f"Found inputs with {wrong}, expected the same")
        except Exception:
            log.exception("%s it could not be read", named(item.id))
            item.fail("error", "The server failed to read this request")

    def _answer(self, items: list[_Request]) -> None:
        for part in by_shape(items, lambda item: item.inputs, 1):
            self._answer_together(part)

    def _answer_together(self, items: list[_Request]) -> None:
        batch = self._batch(items)
        self._refuse_non_finite(items, batch)
        self._refuse_unreadable(items, batch)
        good = [item for item in items if item.outcome == "ok"]
        if len(good) < len(items):
            if good:
                self._answer_together(good)
            return

        def run(some: list[_Request]) -> tuple[Tensor, ...]:
            rows = slice(some[0].rows.start, some[-1].rows.stop)
            observer = None if self._uncounted else self.observer
            inputs = [x[rows] for x in batch]
            with phase(INFERENCE, some):
                return run_network(self.model, inputs, self._counting, observer)

        for group, outputs in together_or_alone(items, run, attrgetter("id")):
            if outputs is None:
                group[0].fail("error", NETWORK_FAILED)
                continue
            first = group[0].rows.start
            readable = [_readable(y) for y in outputs]
            wrong = [flags for flags in map(non_finite_rows, readable) if flags is not None]
            for item in group:
                rows = slice(item.rows.start - first, item.rows.stop - first)
                item.outputs = tuple(y[rows] for y in readable)
                if any(bool(flags[rows].any()) for flags in wrong):
                    log.error("%s the network's output is not finite", named(item.id))
                    item.fail("error", NOT_FINITE)

    def _batch(self, items: list[_Request]) -> tuple[Tensor, ...]:
        """Copy all rows into one tensor for each input: Triton's memory is not aligned for its elements."""
        start = 0
        for item in items:
            item.rows = slice(start, start + len(item.inputs[0]))
            start = item.rows.stop
        columns = zip(*(item.inputs for item in items), strict=True)
        specs = self.model.inputs
        return tuple(torch.cat(column).to(getattr(torch, s.dtype)) for column, s in zip(columns, specs, strict=True))

    def _refuse_non_finite(self, items: list[_Request], batch: tuple[Tensor, ...]) -> None:
        for spec, x in zip(self.model.inputs, batch, strict=True):
            wrong = non_finite_rows(x)
            for item in items:
                if wrong is not None and bool(wrong[item.rows].any()):
                    found = f"Found input {spec.name!r} with NaN, infinity or values beyond {spec.dtype}"
                    item.fail("bad_request", f"{found}, expected finite ones")

    def _refuse_unreadable(self, items: list[_Request], batch: tuple[Tensor, ...]) -> None:
        for spec, x in zip(self.model.inputs, batch, strict=True):
            if outside(spec, x) is None:
                continue
            for item in items:
                if wrong := outside(spec, x[item.rows]):
                    item.fail("bad_request", f"Found input {spec.name!r} with {wrong}")

    @property
    def _counting(self) -> Metrics | None:
        return None if self._uncounted else self.metrics

    def _response(self, item: _Request, seconds: float) -> Any:
        backend = self._backend
        if item.outcome != "ok":
            codes = {"bad_request": backend.TritonError.INVALID_ARG, "error": backend.TritonError.INTERNAL}
            return backend.InferenceResponse(error=backend.TritonError(item.reason, codes[item.outcome]))
        names = self.model.output_names
        outputs = [backend.Tensor.from_dlpack(name, y) for name, y in zip(names, item.outputs, strict=True)]
        told = {"parameters": {HANDLER_PARAMETER: write_seconds(seconds)}} if self._answers_parameters else {}
        return backend.InferenceResponse(output_tensors=outputs, **told)


def non_finite_rows(x: Tensor) -> Tensor | None:
    """Return a mask (N,) of the rows of x (N, ...) that hold NaN or infinity; None where none does."""
    # A sum is one pass over the memory and hides neither; it may overflow by itself, so it only acquits.
    if not x.is_floating_point() or math.isfinite(float(x.sum())):
        return None
    wrong = ~torch.isfinite(x).flatten(1).all(1) if x.dim() > 1 else ~torch.isfinite(x)
    return wrong if bool(wrong.any()) else None


def _takes_parameters(backend: Any) -> bool:
    try:
        backend.InferenceResponse(output_tensors=[], parameters={})
    except TypeError:
        return False
    return True


def _readable(y: Tensor) -> Tensor:
    """Make an output row-major, and float32 instead of bfloat16, which clients with numpy cannot read."""
    return (y.float() if y.dtype is torch.bfloat16 else y).contiguous()


def _device(args: dict[str, str]) -> str:
    """Make the GPU that Triton gave this instance the process's own, and return its name; else ``cpu``."""
    if args["model_instance_kind"] != "GPU":
        return "cpu"
    if not torch.cuda.is_available():
        log.warning("this instance was given a GPU, but torch finds none: it runs on the CPU")
        return "cpu"
    index = int(args["model_instance_device_id"])
    torch.cuda.set_device(index)
    return f"cuda:{index}"
