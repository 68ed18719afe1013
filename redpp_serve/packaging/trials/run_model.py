"""Run one version of a Triton model repository on ``request.bin``, configured by ``config.json``, both in this folder.

Usage: python run_model.py VERSION. It prints the time and the reply as one line of JSON. The module
triton_python_backend_utils beside this program takes the place of Triton's.
"""

import importlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch


def main(version: str) -> None:
    """Run the model as Triton's Python back end would; the first request is the warm-up."""
    sys.dont_write_bytecode = True
    sys.path.insert(0, version)
    backend = importlib.import_module("triton_python_backend_utils")
    config = json.loads(Path("config.json").read_text())
    loaded = np.load("request.bin")
    names = [spec["name"] for spec in config["input"]]
    arrays = [loaded] if isinstance(loaded, np.ndarray) else [loaded[name] for name in names]
    inputs = {name: torch.from_numpy(array[None]) for name, array in zip(names, arrays, strict=True)}
    served = importlib.import_module("model").TritonPythonModel()
    served.initialize(
        {
            "model_config": json.dumps(config),
            "model_name": config["name"],
            "model_version": Path(version).name,
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
        }
    )
    milliseconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        (response,) = served.execute([backend.InferenceRequest(inputs)])
        milliseconds = 1e3 * (time.perf_counter() - start)
    served.finalize()
    if response.has_error():
        reply = {"error": response.error().message()}
    else:
        reply = {"outputs": {tensor.name(): tensor.held[0].tolist() for tensor in response.output_tensors()}}
    print(json.dumps({"milliseconds": milliseconds, "reply": reply}))


if __name__ == "__main__":
    main(*sys.argv[1:])
