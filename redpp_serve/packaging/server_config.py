"""TorchServe's configuration files: loopback only, no models over the API, quiet logs."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from redpp_serve.errors import RedppError
from redpp_serve.loopback import Ports
from redpp_serve.options import Serving
from redpp_serve.packaging.templates import render

CONFIG = "config.properties"
MAX_REQUEST_BYTES = 16 << 20  # an input of 3 x 1024 x 1024 float32 fits
_MOST_BYTES = 2**31 - 1  # of TorchServe's requests and replies
_NUMBER_BYTES = 25  # of a number in JSON, such as -1.2345678901234567e-05 and a comma
_HEAP_MB = 512


@dataclass(frozen=True)
class Limits:
    """What TorchServe takes and gives at most, bytes: far less than it could is a defence, too."""

    request: int = MAX_REQUEST_BYTES
    response: int = MAX_REQUEST_BYTES

    @property
    def heap_mb(self) -> int:
        """Memory of the Java process, MB: it holds a few copies of what passes through."""
        return _HEAP_MB + 4 * (self.request + self.response - 2 * MAX_REQUEST_BYTES >> 20)


def limits_for(inputs: int, outputs: int) -> Limits:
    """Return limits in which one input and its answer fit as JSON, and 16 MB in any case.

    Args:
        inputs: numbers in all inputs of one item, at their largest sizes.
        outputs: numbers in all its outputs.

    Raises:
        RedppError: TorchServe could not serve them.
    """
    request, response = (max(MAX_REQUEST_BYTES, _NUMBER_BYTES * count + 65536) for count in (inputs, outputs))
    if max(request, response) > _MOST_BYTES:
        raise RedppError(
            f"inputs of {inputs} numbers and outputs of {outputs}",
            f"as many as fit into {_MOST_BYTES} bytes of JSON, which is TorchServe's limit",
            "give smaller sizes in --input, or let the network shrink its outputs",
        )
    return Limits(request, response)


def read_limits(folder: Path) -> Limits:
    """Return the limits of a packaged folder; those of earlier releases where it names none."""
    try:
        text = (folder / CONFIG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = dict(re.findall(r"^max_(request|response)_size=([0-9]{1,10})$", text, re.MULTILINE))
    return Limits(**{key: min(_MOST_BYTES, max(MAX_REQUEST_BYTES, int(value))) for key, value in found.items()})


# Workers print to MODEL_LOG at INFO whatever the level in Python, tracebacks included; so the line for each request
# is dropped by pattern, and so is a warning that the archive leaves the number of workers to config.properties.
LOG4J2 = render("log4j2.xml")


def config_properties(
    ports: Ports = Ports(), *, workers: int = 1, token_minutes: int = 60, limits: Limits = Limits()
) -> str:
    """Return ``config.properties``. It holds no paths, so it works beside the archives on any machine.

    Args:
        ports: where the server listens on the loopback address.
        workers: worker processes for each version.
        token_minutes: minutes until the tokens that the server writes to ``key_file.json`` expire.
        limits: what it takes and gives at most.
    """
    return render(CONFIG, **asdict(ports), workers=workers, token_minutes=token_minutes, limits=limits)


def model_config(serving: Serving) -> str:
    """Return ``model-config.yaml`` of an archive: batching, and each worker's threads, precision and engine.

    The number of workers is left to ``config.properties``: it belongs to the machine, and a number here would win.
    Workers that start together choose their kernels one after the other, hence the long start-up time.
    """
    return render("model-config.yaml", **asdict(serving))
