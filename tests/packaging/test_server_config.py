"""TorchServe's configuration files. That the server takes them is shown by test_serving_torchserve.py."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import yaml

from redpp_serve.errors import RedppError
from redpp_serve.loopback import Ports
from redpp_serve.options import Serving
from redpp_serve.packaging.server_config import (
    LOG4J2,
    MAX_REQUEST_BYTES,
    Limits,
    config_properties,
    limits_for,
    model_config,
    read_limits,
)


def properties(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines())


def test_everything_listens_on_loopback_and_nothing_is_loaded_over_the_api() -> None:
    found = properties(config_properties())
    addresses = {k: v for k, v in found.items() if k.endswith("_address")}
    assert len(addresses) == 5 and all("127.0.0.1" in value for value in addresses.values())
    assert found["enable_model_api"] == found["install_py_dep_per_model"] == "false"
    for url in ("http://example.org/x.mar", "https://example.org/x.mar", "file:///etc/x.mar", "s3://bucket/x.mar"):
        assert not re.fullmatch(found["allowed_urls"], url)


def test_ports_workers_and_metrics() -> None:
    found = properties(config_properties(Ports(1, 2, 3, 4, 5), workers=6, token_minutes=7))
    assert [found[f"{k}_address"][-2:] for k in ("inference", "management", "metrics")] == [":1", ":2", ":3"]
    assert (found["grpc_inference_port"], found["grpc_management_port"]) == ("4", "5")
    assert (found["default_workers_per_model"], found["token_expiration_min"]) == ("6", "7")
    assert found["metrics_mode"] == "prometheus" and found["vmargs"] == "-Xmx512m"


def test_a_large_image_as_float32_fits_into_a_request() -> None:
    found = properties(config_properties())
    assert 3 * 1024 * 1024 * 4 + 128 < MAX_REQUEST_BYTES == int(found["max_request_size"])
    assert int(found["max_response_size"]) == MAX_REQUEST_BYTES


def test_limits_follow_the_sizes_and_come_back_from_a_package(tmp_path: Path) -> None:
    assert read_limits(tmp_path) == limits_for(3 * 224 * 224, 1000) == Limits()
    large = limits_for(3 * 1280 * 1280, 8 * 256 * 256)
    rng = np.random.default_rng(0)
    number = max(len(str(float(x))) for x in (-rng.random(100_000) * 1e-5).astype(np.float32))
    assert large.request > 3 * 1280 * 1280 * (number + 1) and large.response == MAX_REQUEST_BYTES
    assert limits_for(1, 8 * 1024 * 1024).response > 8 * 1024 * 1024 * (number + 1)
    (tmp_path / "config.properties").write_text(config_properties(limits=large))
    assert read_limits(tmp_path) == large
    (tmp_path / "config.properties").write_text("max_request_size=9999999999\nmax_response_size=1\n")
    assert read_limits(tmp_path) == Limits(2**31 - 1, MAX_REQUEST_BYTES)
    with pytest.raises(RedppError, match="smaller sizes"):
        limits_for(10**9, 1)


def test_model_config_is_yaml_with_the_servers_keys() -> None:
    assert yaml.safe_load(model_config(Serving(8, 20, 2))) == {
        "batchSize": 8,
        "maxBatchDelay": 20,
        "responseTimeout": 120,
        "startupTimeout": 300,
        "handler": {"threads": 2, "precision": "auto", "engine": "auto"},
    }


def test_the_log_drops_the_line_for_each_request_and_keeps_errors() -> None:
    loggers = ElementTree.fromstring(LOG4J2).find("Loggers")
    assert loggers is not None
    by_name = {logger.get("name"): logger for logger in loggers}
    pattern = by_name["MODEL_LOG"].find("RegexFilter").get("regex")
    assert re.fullmatch(pattern, "Backend received inference at: 1763838400")
    assert not re.fullmatch(pattern, "Backend worker process died.")
    assert by_name["ACCESS_LOG"].get("level") == "off" and by_name[None].get("level") == "warn"
