"""Serve the original and the pruned network in TorchServe: the same handler for both.

A batch holds requests of unrelated clients: each is parsed, refused, run and answered so that one bad request
costs its sender a 400 and nobody else anything.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redpp_serve.errors import RedppError
from redpp_serve.graph.ranges import blank
from redpp_serve.graph.sizes import ends, resized
from redpp_serve.handlers import open_inference
from redpp_serve.handlers.answers import Answer, NotFinite, Question, Served, check_finite, plain_answer
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
from redpp_serve.handlers.payload import BadRequest, parse_items, read_json
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.handlers.prometheus import open_metrics
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
from redpp_serve.handlers.wire import HANDLER_HEADER, LENGTH_HEADER, PROBE_ID, VARIANT_HEADER, write_seconds
from redpp_serve.runtime.model import ServingModel
from redpp_serve.runtime.observer import Observer

log = logging.getLogger(__name__)

_DESCRIBE = "describe"  # the header by which TorchServe asks for a model's metadata
_OUTCOMES = {200: "ok", 400: "bad_request", 500: "error"}


@dataclass
class _Reply:
    """One request on its way: what it asks, then its answer or the reason it failed.

    Attributes:
        headers: the request's, by names in lower case.
        own_id: returns the server's own id of it.
    """

    headers: Mapping[str, str]
    own_id: Callable[[], str | None]
    trace: Traced | None = None
    question: Question | None = None
    answer: Answer = field(default_factory=Answer)
    status: int = 200
    reason: str = ""

    @property
    def id(self) -> str:
        """The request's id: the one that it came with, such as the gateway's, or else the server's own."""
        return request_id(self.headers.get(ID_HEADER)) or request_id(self.own_id())

    @property
    def counts(self) -> bool:
        """Whether a client asked the network, or failed to."""
        return self.id != PROBE_ID and (self.question is not None or self.status != 200)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the network is asked, (N, ...) for each input; nothing where it is not asked."""
        return self.question.tensors if self.question else ()

    def fail(self, status: int, reason: str) -> None:
        """Answer with an error. The reason is part of the status line: one line of printable ASCII, or HTTP breaks."""
        line = " ".join(reason.split()).encode("ascii", "replace").decode()
        self.status, self.reason = status, "".join(c if c.isprintable() else "?" for c in line)[:300]
        self.answer = Answer(json.dumps({"error": self.reason}).encode())


class RedppHandler:
    """Loads one artifact and answers batches; TorchServe makes one object in each worker process."""

    model: ServingModel
    served: Served
    preprocess: Preprocess | None
    metrics: Metrics | None
    observer: Observer | None
    spans: Spans | None
    variant: str

    def initialize(self, context: Any) -> None:
        """Load the artifact named in the archive's manifest, warm it up, and open the metrics.

        Raises:
            RedppError: a damaged artifact, a preprocessing that does not fit it, or wrong
                ``threads``, ``precision`` or ``engine``.
        """
        start = time.perf_counter()
        # Bodies are parsed here. The server's own attempt would log a traceback for each bad one.
        os.environ["TS_DECODE_INPUT_REQUEST"] = "false"
        config = (context.model_yaml_config or {}).get("handler") or {}
        set_threads(config.get("threads"), "model-config.yaml")
        properties = context.system_properties
        gpu = properties.get("gpu_id")
        device = f"cuda:{gpu}" if gpu is not None and torch.cuda.is_available() else "cpu"
        artifact = Path(properties["model_dir"]) / context.manifest["model"]["serializedFile"]
        self.model = load_model(
            artifact,
            device,
            batch=properties.get("batch_size"),
            precision=config.get("precision"),
            engine=config.get("engine"),
            where="model-config.yaml",
        )
        description = self.model.description
        self.variant = str(description["variant"])
        self.preprocess = _preprocess(self.model)
        self.served = _served(context.model_name, self.model)
        labels = ModelLabels(context.model_name, str(description["version"]), self.variant)
        self.metrics = open_metrics(labels, device)
        if self.metrics:
            describe(self.metrics, self.model)
        self.observer = open_observer(artifact, self.model)
        self.spans = open_spans(labels)
        if self.metrics:
            self.metrics.ready(time.perf_counter() - start)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """Return one body for each request of the batch; statuses and headers go through ``context``."""
        start, start_ns = time.perf_counter(), time.time_ns()
        replies = [
            _Reply(_lower(context.get_all_request_header(i)), partial(context.get_request_id, i))
            for i in range(len(data))
        ]
        for reply, item in zip(replies, data, strict=True):
            if self.spans:
                reply.trace = self.spans.begin(reply.id, reply.headers)
            with phase(PREPROCESS, [reply]):
                self._read(reply, item)
        if good := [reply for reply in replies if reply.question]:
            self._answer(good)
        seconds = time.perf_counter() - start
        for index, reply in enumerate(replies):
            if reply.status != 200:
                context.set_response_status(reply.status, reply.reason, index)
            context.set_response_content_type(index, reply.answer.content_type)
            told = {HANDLER_HEADER: write_seconds(seconds), VARIANT_HEADER: self.variant}
            for key, value in {**reply.answer.headers, **told}.items():
                context.set_response_header(index, key, value)
        if self.metrics and (counted := [reply for reply in replies if reply.counts]):
            self.metrics.batch(len(counted), seconds)
            for reply in counted:
                self.metrics.request(_OUTCOMES[reply.status])
        if self.spans:
            self.spans.note(start_ns, [(_OUTCOMES[reply.status], reply.trace) for reply in replies])
        return [reply.answer.body for reply in replies]

    def _read(self, reply: _Reply, item: dict[str, Any]) -> None:
        try:
            if reply.headers.get(_DESCRIBE) == "True":
                reply.answer = Answer(json.dumps(self._metadata).encode())
            else:
                reply.question = self._question(item, reply.headers)
        except BadRequest as error:
            reply.fail(400, f"Found {error}")
        except Exception:
            log.exception("%s it could not be parsed", named(reply.id))
            reply.fail(500, "The server failed to parse this request")

    def _question(self, item: dict[str, Any], headers: Mapping[str, str]) -> Question:
        body, length = item.get("body"), headers.get(LENGTH_HEADER.lower())
        if isinstance(body, (bytes, bytearray)):
            body = open_inference.unpacked(body, headers.get("content-encoding", ""))
            tail = memoryview(b"")
            if length is not None:
                body, tail = open_inference.split(body, length)
            elif body[:64].lstrip()[:1] == b"{":
                body = read_json(body)
            if length is not None or open_inference.is_open_inference(body):
                return open_inference.read(body, tail, self.served, self.preprocess)
            item = {"body": body}
        parsed = parse_items(item, self.model.inputs, self.preprocess)
        return Question(
            parsed.tensors,
            plain_answer(headers, self.served, one=parsed.one and not parsed.listed, listed=parsed.listed),
        )

    @cached_property
    def _metadata(self) -> dict[str, Any]:
        return open_inference.metadata(self.served, _outputs(self.model))

    def _answer(self, replies: list[_Reply]) -> None:
        parts = by_shape(replies, lambda reply: reply.tensors, 1)
        for group, outputs in chain.from_iterable(
            together_or_alone(part, self._run, attrgetter("id")) for part in parts
        ):
            if outputs is None:
                group[0].fail(500, NETWORK_FAILED)
                continue
            start = 0
            for reply in group:
                rows = slice(start, start + len(reply.tensors[0]))
                start = rows.stop
                with phase(POSTPROCESS, [reply]):
                    self._finish(reply, [output[rows] for output in outputs])

    def _finish(self, reply: _Reply, outputs: list[Tensor]) -> None:
        assert reply.question is not None
        try:
            check_finite(outputs)
            reply.answer = reply.question.answer(outputs)
        except NotFinite:
            log.error("%s the network's output is not finite", named(reply.id))
            reply.fail(500, NOT_FINITE)
        except Exception:
            log.exception("%s its answer could not be written", named(reply.id))
            reply.fail(500, "The server failed to write this answer")

    def _run(self, replies: list[_Reply]) -> tuple[Tensor, ...]:
        with phase(INFERENCE, replies):
            return self._network(replies)

    def _network(self, replies: list[_Reply]) -> tuple[Tensor, ...]:
        """Run the network on all rows, in parts of its largest batch."""
        columns = [torch.cat(column) for column in zip(*(reply.tensors for reply in replies), strict=True)]
        parts = zip(*(column.split(self.model.batches[-1]) for column in columns), strict=True)
        runs = [run_network(self.model, part, self.metrics, self.observer) for part in parts]
        return runs[0] if len(runs) == 1 else tuple(torch.cat(ys) for ys in zip(*runs, strict=True))


def _lower(headers: Mapping[str, Any]) -> dict[str, str]:
    """Return the headers by their names in lower case; TorchServe puts the types of a form's fields among them."""
    return {name.lower(): value for name, value in headers.items() if isinstance(value, str)}


def _served(name: str, model: ServingModel) -> Served:
    version, labels = str(model.description["version"]), tuple(model.description.get("labels") or ())
    return Served(name, version, model.inputs, tuple(model.output_names), model.names_outputs, labels)


def _outputs(model: ServingModel) -> list[open_inference.Described]:
    sizes = [{}, *ends(model.inputs)[:2]]
    runs = [model(*(blank(resized(spec, some), 1) for spec in model.inputs)) for some in sizes]
    columns = zip(*runs, strict=True)
    return [open_inference.described_output(*given) for given in zip(model.output_names, columns, strict=True)]


def _preprocess(model: ServingModel) -> Preprocess | None:
    document = model.description.get("preprocess")
    if document is None:
        return None
    preprocess = Preprocess.from_json(document)
    shapes = [i.shape for i in model.inputs]
    if shapes != [preprocess.shape]:
        raise RedppError(
            f"a preprocessing that yields {preprocess.shape} for inputs of shapes {shapes}",
            "one input of the preprocessing's shape",
            "package the model again with a matching preprocessing",
        )
    return preprocess
