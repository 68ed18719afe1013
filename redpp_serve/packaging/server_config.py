"""TorchServe's configuration files as text: loopback only, no models over the API, quiet logs."""

from __future__ import annotations

MAX_REQUEST_BYTES = 16 << 20  # an input of 3 x 1024 x 1024 float32 fits

# Workers print to MODEL_LOG at INFO whatever the level in Python, tracebacks included; so the line for each request
# is dropped by pattern, and so is a warning that the archive leaves the number of workers to config.properties.
LOG4J2 = """<?xml version="1.0" encoding="UTF-8"?>
<Configuration status="ERROR">
  <Appenders>
    <Console name="STDOUT" target="SYSTEM_OUT">
      <PatternLayout pattern="%d{ISO8601} [%-5p] %c - %m%n"/>
    </Console>
  </Appenders>
  <Loggers>
    <Logger name="ACCESS_LOG" level="off"/>
    <Logger name="MODEL_METRICS" level="off"/>
    <Logger name="TS_METRICS" level="off"/>
    <Logger name="MODEL_LOG" level="info" additivity="false">
      <RegexFilter regex="Backend received inference at: .*" onMatch="DENY" onMismatch="NEUTRAL"/>
      <AppenderRef ref="STDOUT"/>
    </Logger>
    <Root level="warn">
      <RegexFilter regex="Invalid model config in mar, minWorkers:0, .*" onMatch="DENY" onMismatch="NEUTRAL"/>
      <AppenderRef ref="STDOUT"/>
    </Root>
  </Loggers>
</Configuration>
"""


def config_properties(
    *,
    inference: int = 8080,
    management: int = 8081,
    metrics: int = 8082,
    grpc_inference: int = 7070,
    grpc_management: int = 7071,
    workers: int = 1,
    token_minutes: int = 60,
) -> str:
    """``config.properties``. Holds no paths, so it works beside the archives on any machine.

    Args:
        inference, management, metrics, grpc_inference, grpc_management: ports, all on the loopback address.
        workers: worker processes for each version.
        token_minutes: minutes until the tokens that the server writes to ``key_file.json`` expire.
    """
    lines = {
        "inference_address": f"http://127.0.0.1:{inference}",
        "management_address": f"http://127.0.0.1:{management}",
        "metrics_address": f"http://127.0.0.1:{metrics}",
        "grpc_inference_address": "127.0.0.1",
        "grpc_management_address": "127.0.0.1",
        "grpc_inference_port": grpc_inference,
        "grpc_management_port": grpc_management,
        "default_workers_per_model": workers,
        "token_expiration_min": token_minutes,
        "max_request_size": MAX_REQUEST_BYTES,
        "metrics_mode": "prometheus",
        "disable_system_metrics": "true",
        "allowed_urls": "file:///nothing/is/loaded/by/url",
        "enable_model_api": "false",
        "install_py_dep_per_model": "false",
        "vmargs": "-Xmx512m",
    }
    return "".join(f"{key}={value}\n" for key, value in lines.items())


def model_config(batch_size: int, max_batch_delay_ms: int, threads: int, precision: str = "fp32") -> str:
    """``model-config.yaml`` of an archive: how the server batches; torch threads and precision of each worker.

    The number of workers is left to ``config.properties``: it belongs to the machine, and a number here would win.
    """
    return (
        f"batchSize: {batch_size}\n"
        f"maxBatchDelay: {max_batch_delay_ms}\n"
        "responseTimeout: 120\n"
        "startupTimeout: 300\n"  # workers that start together choose their kernels one after the other
        "handler:\n"
        f"  threads: {threads}\n"
        f"  precision: {precision}\n"
    )
