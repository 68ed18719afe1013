"""Names and encodings of what a reply carries, for both of its ends, and of what a handler is told to do.

The handlers write replies with this module, `comparison` reads them with it, and tests/wires checks the two together.
TorchServe's handler answers ``{"outputs": [...]}``, or ``{"outputs": {name: ...}}`` where the network names its
outputs, with headers; Triton's model answers named tensors with response parameters. It needs the standard library
alone, so that a client can import it without torch.
"""

from __future__ import annotations

import math

HANDLER_HEADER = "X-Redpp-Handler-Ms"  # on every reply: the batch's time in the handler
VARIANT_HEADER = "X-Redpp-Variant"  # on every reply: ``original`` or ``pruned``
HANDLER_PARAMETER = "redpp_handler_ms"  # the same time as a response parameter, where the back end takes those
OUTPUTS_KEY = "outputs"
INSTANCES_KEY, PREDICTIONS_KEY = "instances", "predictions"  # of a request that lists items, and of its answer
CLASSES_KEY = "classes"  # of an answer that names the best classes instead of the outputs
TOP_HEADER = "X-Redpp-Top-K"  # of a request: how many classes to name
LENGTH_HEADER = "Inference-Header-Content-Length"  # of the Open Inference Protocol: where JSON ends and tensors begin
PROBE_ID = (
    "redpp-probe"  # the id of a request that asks whether the server is well: no user's, so it counts for nothing
)
OBSERVE_VARIABLE = "REDPP_OBSERVE"  # environment of a server: one request to the original in so many is observed
OBSERVE_FILE_VARIABLE = "REDPP_OBSERVE_FILE"  # and the file that its moments are added to


def write_seconds(seconds: float) -> str:
    """Encode a duration as text, in milliseconds: HTTP headers are text, and Triton's parameters have no fractions."""
    return f"{1000 * seconds:.3f}"


def read_seconds(milliseconds: str | None) -> float | None:
    """Decode `write_seconds`; None for a text that is missing, not a number, not finite or not positive."""
    try:
        seconds = float(milliseconds or 0) / 1000
    except ValueError:
        return None
    return seconds if 0 < seconds < math.inf else None
