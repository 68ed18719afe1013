"""Requests to NVIDIA Triton Inference Server over gRPC, through its own client library.

Triton takes tensors only: images and documents become tensors here, before the clock starts, by the same code that
TorchServe's handler runs behind it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from redpp_serve.comparison.client import TIMEOUT_S, Endpoint, Exchange, Payload
from redpp_serve.graph.graph import InputSpec
from redpp_serve.handlers.payload import BadRequest, parse_items
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.handlers.wire import HANDLER_PARAMETER, read_seconds

_KEPT_BYTES = 256 << 20  # of converted inputs, for each connection
# As TorchServe would say it over HTTP, so that both servers' errors read alike.
_STATUS = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 413,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}


@dataclass(frozen=True)
class TritonEndpoint(Endpoint):
    """One version of a model. ``url`` is host:port of gRPC, ``headers`` its metadata.

    Attributes:
        model: the served name.
        version: Triton's whole number.
        inputs: what the network takes.
        preprocess: how images become its input; None where none was declared.
    """

    model: str
    version: str
    inputs: tuple[InputSpec, ...]
    preprocess: Preprocess | None

    def connect(self) -> TritonConnection:
        """Return a connection of its own, not open yet."""
        return TritonConnection(self)


class TritonConnection:
    """A `client.Wire` of gRPC; each has a socket of its own, as the connections of `client.Connection` have."""

    def __init__(self, endpoint: TritonEndpoint, timeout_s: float = TIMEOUT_S) -> None:
        self.endpoint, self._timeout_s = endpoint, timeout_s
        self._client: Any = None
        self._converted: dict[Payload, list[Any]] = {}
        self._bytes = 0

    def send(self, payload: Payload) -> Exchange:
        """Send one input and time it; one that cannot be converted is a 400 without a request."""
        try:
            inputs = self._inputs(payload)
        except BadRequest as error:
            return Exchange(time.perf_counter(), 0.0, None, 400, b"", f"found {error}")
        return self.infer(inputs, payload.items)

    def infer(self, inputs: list[Any], items: int = 1) -> Exchange:
        """Send tritonclient inputs as they are, see `as_input`; outputs of one item have no leading dimension."""
        from tritonclient.utils import InferenceServerException  # noqa: PLC0415

        client = self._open()
        start = time.perf_counter()
        try:
            result = client.infer(
                self.endpoint.model,
                inputs,
                self.endpoint.version,
                headers=self.endpoint.headers,
                client_timeout=self._timeout_s,
            )
        except InferenceServerException as error:
            status = _STATUS.get(str(error.status()).removeprefix("StatusCode."), 500)
            return Exchange(start, time.perf_counter() - start, None, status, b"", error.message() or str(error))
        seconds = time.perf_counter() - start
        outputs = [result.as_numpy(output.name) for output in result.get_response().outputs]
        outputs = [output[0] for output in outputs] if items == 1 else outputs
        return Exchange(start, seconds, _handler_seconds(result), 200, outputs, "")

    def _open(self) -> Any:
        from tritonclient.grpc import InferenceServerClient  # noqa: PLC0415

        if self._client is None:
            private = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
            self._client = InferenceServerClient(self.endpoint.url, channel_args=private)
        return self._client

    def _inputs(self, payload: Payload) -> list[Any]:
        """Return the payload as Triton's inputs, batch first, kept for the next time while there is room."""
        if payload in self._converted:
            return self._converted[payload]
        tensors = parse_items({"body": payload.body}, self.endpoint.inputs, self.endpoint.preprocess).tensors
        if len(tensors[0]) != payload.items:
            raise BadRequest(f"{len(tensors[0])} items, expected {payload.items}")
        inputs = [as_input(spec.name, x.numpy()) for spec, x in zip(self.endpoint.inputs, tensors, strict=True)]
        self._bytes += sum(tensor.nbytes for tensor in tensors)
        if self._bytes <= _KEPT_BYTES:
            self._converted[payload] = inputs
        return inputs

    def close(self) -> None:
        """Close the channel."""
        if self._client is not None:
            self._client.close()
        self._client = None


def as_input(name: str, array: np.ndarray) -> Any:
    """Return a tritonclient input that holds the array, batch first."""
    from tritonclient.grpc import InferInput  # noqa: PLC0415
    from tritonclient.utils import np_to_triton_dtype  # noqa: PLC0415

    tensor = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array)
    return tensor


def _handler_seconds(result: Any) -> float | None:
    parameters = result.get_response().parameters
    return read_seconds(parameters[HANDLER_PARAMETER].string_param) if HANDLER_PARAMETER in parameters else None
