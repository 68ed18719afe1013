"""Serve the original and the pruned network in TorchServe: the same handler for both.

A batch holds requests of unrelated clients: each is parsed, refused, run and answered so that one bad request
costs its sender a 400 and nobody else anything.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redpp_serve.errors import RedppError
from redpp_serve.handlers.batching import (
    NETWORK_FAILED,
    NOT_FINITE,
    describe,
    load_model,
    open_observer,
    run_network,
    set_threads,
    together_or_alone,
)
from redpp_serve.handlers.metrics import Metrics, ModelLabels
from redpp_serve.handlers.payload import BadRequest, parse
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.handlers.prometheus import open_metrics
from redpp_serve.handlers.wire import HANDLER_HEADER, OUTPUTS_KEY, VARIANT_HEADER, write_seconds
from redpp_serve.runtime.model import ServingModel
from redpp_serve.runtime.observer import Observer

log = logging.getLogger(__name__)

_OUTCOMES = {200: "ok", 400: "bad_request", 500: "error"}


@dataclass
class _Reply:
    """One request on its way: its tensors, then its body or the reason it failed."""

    tensors: tuple[Tensor, ...] = ()
    body: bytes = b""
    status: int = 200
    reason: str = ""

    def fail(self, status: int, reason: str) -> None:
        """Answer with an error. The reason is part of the status line: one line of printable ASCII, or HTTP breaks."""
        line = " ".join(reason.split()).encode("ascii", "replace").decode()
        self.status, self.reason = status, "".join(c if c.isprintable() else "?" for c in line)[:300]
        self.body = json.dumps({"error": self.reason}).encode()


class RedppHandler:
    """Loads one artifact and answers batches; TorchServe makes one object in each worker process."""

    model: ServingModel
    preprocess: Preprocess | None
    metrics: Metrics | None
    observer: Observer | None
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
        labels = ModelLabels(context.model_name, str(description["version"]), self.variant)
        self.metrics = open_metrics(labels, device)
        if self.metrics:
            describe(self.metrics, self.model)
        self.observer = open_observer(artifact, self.model)
        if self.metrics:
            self.metrics.ready(time.perf_counter() - start)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """Return one JSON body for each request of the batch; statuses and headers go through ``context``."""
        start = time.perf_counter()
        replies = [self._parse(item) for item in data]
        if good := [reply for reply in replies if reply.status == 200]:
            self._answer(good)
        seconds = time.perf_counter() - start
        for index, reply in enumerate(replies):
            if reply.status != 200:
                context.set_response_status(reply.status, reply.reason, index)
            context.set_response_content_type(index, "application/json")
            context.set_response_header(index, HANDLER_HEADER, write_seconds(seconds))
            context.set_response_header(index, VARIANT_HEADER, self.variant)
        if self.metrics:
            self.metrics.batch(len(replies), seconds)
            for reply in replies:
                self.metrics.request(_OUTCOMES[reply.status])
        return [reply.body for reply in replies]

    def _parse(self, item: dict[str, Any]) -> _Reply:
        reply = _Reply()
        try:
            reply.tensors = parse(item, self.model.inputs, self.preprocess)
        except BadRequest as error:
            reply.fail(400, f"Found {error}")
        except Exception:
            log.exception("a request could not be parsed")
            reply.fail(500, "The server failed to parse this request")
        return reply

    def _answer(self, replies: list[_Reply]) -> None:
        for group, outputs in together_or_alone(replies, self._run):
            if outputs is None:
                group[0].fail(500, NETWORK_FAILED)
                continue
            for index, reply in enumerate(group):
                try:
                    rows = [output[index].tolist() for output in outputs]
                    reply.body = json.dumps({OUTPUTS_KEY: rows}, separators=(",", ":"), allow_nan=False).encode()
                except ValueError:  # JSON has no NaN
                    reply.fail(500, NOT_FINITE)

    def _run(self, replies: list[_Reply]) -> tuple[Tensor, ...]:
        columns = zip(*(reply.tensors for reply in replies), strict=True)
        return run_network(self.model, [torch.stack(column) for column in columns], self.metrics, self.observer)


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
