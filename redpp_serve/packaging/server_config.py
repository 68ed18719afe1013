"""TorchServe's configuration files: loopback only, no models over the API, quiet logs."""

from __future__ import annotations

from dataclasses import asdict

from redpp_serve.loopback import Ports
from redpp_serve.options import Serving
from redpp_serve.packaging.templates import render

MAX_REQUEST_BYTES = 16 << 20  # an input of 3 x 1024 x 1024 float32 fits

# Workers print to MODEL_LOG at INFO whatever the level in Python, tracebacks included; so the line for each request
# is dropped by pattern, and so is a warning that the archive leaves the number of workers to config.properties.
LOG4J2 = render("log4j2.xml")


def config_properties(ports: Ports = Ports(), *, workers: int = 1, token_minutes: int = 60) -> str:
    """Return ``config.properties``. It holds no paths, so it works beside the archives on any machine.

    Args:
        ports: where the server listens on the loopback address.
        workers: worker processes for each version.
        token_minutes: minutes until the tokens that the server writes to ``key_file.json`` expire.
    """
    given = {"workers": workers, "token_minutes": token_minutes, "max_request_bytes": MAX_REQUEST_BYTES}
    return render("config.properties", **asdict(ports), **given)


def model_config(serving: Serving) -> str:
    """Return ``model-config.yaml`` of an archive: batching, and each worker's threads, precision and engine.

    The number of workers is left to ``config.properties``: it belongs to the machine, and a number here would win.
    Workers that start together choose their kernels one after the other, hence the long start-up time.
    """
    return render("model-config.yaml", **asdict(serving))
