"""TorchServe's configuration files. That the server takes them is shown by test_serving_torchserve.py."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import InputSpec
from redpp_serve.handlers import open_inference
from redpp_serve.handlers.answers import NPZ, Served, plain_answer
from redpp_serve.loopback import Ports
from redpp_serve.options import Serving
from redpp_serve.packaging.server_config import (
    LOG4J2,
    MAX_REQUEST_BYTES,
    Limits,
    config_properties,
    limits_for,
    model_config,
    most_json_bytes,
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


MAP, IMAGE = (8, 256, 256), (3, 1280, 1280)


def test_limits_follow_the_sizes_and_come_back_from_a_package(tmp_path: Path) -> None:
    small = limits_for([((3, 224, 224), "float32")], [((1000,), "float32")], 4)
    assert read_limits(tmp_path) == small == Limits()
    large = limits_for([(IMAGE, "float32")], [(MAP, "float32")])
    assert large.request > 24 * math.prod(IMAGE) and large.response == MAX_REQUEST_BYTES
    (tmp_path / "config.properties").write_text(config_properties(limits=large))
    assert read_limits(tmp_path) == large
    (tmp_path / "config.properties").write_text("max_request_size=9999999999\nmax_response_size=1\n")
    assert read_limits(tmp_path) == Limits(2**31 - 1, MAX_REQUEST_BYTES)
    for inputs, outputs in ((10**9, 1), (1, 10**9)):
        with pytest.raises(RedppError, match=r"puts of 1000000000 numbers take 260\d+ bytes of JSON.*smaller sizes"):
            limits_for([((inputs,), "float32")], [((outputs,), "float32")])


def test_a_batch_as_arrays_counts_up_to_the_servers_own_limit() -> None:
    images, maps = 4 * math.prod(IMAGE), 4 * math.prod(MAP)
    eight = limits_for([(IMAGE, "float32")], [(MAP, "float32")], 8)
    assert 8 * images < eight.request < 8 * images + 100_000 and eight.response == 8 * maps + 65536
    assert limits_for([(IMAGE, "bfloat16")], [], 8) == limits_for([(IMAGE, "float32")], [], 8)
    assert limits_for([(IMAGE, "uint8")], [], 32).request == 32 * images // 4 + 65536
    assert limits_for([(IMAGE, "float32")], [], 1000).request == 2**31 - 1, "what one item does not need is no refusal"


WORST = {
    "float32": -np.finfo(np.float32).smallest_normal,
    "float64": -np.finfo(np.float64).smallest_normal,
    "int64": np.iinfo(np.int64).min,
    "uint8": 255,
    "bool": False,
}


@pytest.mark.parametrize(
    "shape,dtype",
    [
        (MAP, "float32"),
        ((8, 16, 16), "bool"),
        ((70_000, 1), "float32"),  # brackets around every number
        ((3, 1, 1, 2), "int64"),
        ((5,), "float64"),
        ((), "uint8"),
        pytest.param(IMAGE, "float32", marks=pytest.mark.exhaustive),
    ],
)
def test_the_longest_bodies_that_are_written_fit_and_hardly_more(shape: tuple[int, ...], dtype: str) -> None:
    """As Python's clients write a request, and as handlers write an answer, in each form of JSON and as an array."""
    array = np.full(shape, WORST[dtype], dtype)
    spec, y = InputSpec("x", shape, dtype), torch.from_numpy(array)[None]
    flat = {"name": "x", "shape": [1, *shape], "datatype": "FP32", "data": array.flatten().tolist()}
    requests = [json.dumps(body).encode() for body in ({"instances": [array.tolist()]}, {"inputs": [flat]})]
    served = Served("m", "1.0", (spec,), ("output_0",))
    answers = [plain_answer({}, served, one=True), plain_answer({}, served, one=False, listed=True)]
    answers += [plain_answer({"accept": NPZ}, served, one=False), open_inference._answer({}, served)]
    replies = [answer((y,)).body for answer in answers]
    most = most_json_bytes(shape, dtype)
    limits = limits_for([(shape, dtype)], [(shape, dtype)])
    assert max(map(len, requests)) <= most + 65536 <= limits.request
    assert max(map(len, replies)) <= most + 65536 <= limits.response
    digits = 1 if dtype == "float32" else 0  # a client that writes doubles has one more
    assert most - len(json.dumps(array.tolist())) == digits * array.size


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
